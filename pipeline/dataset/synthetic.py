"""A made-up ImageNet: the archive's own tree and lists, with pictures that a network can learn, in any size.

The same settings give the same bytes, file for file.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.command import run_command
from pipeline.dataset import imagenet
from pipeline.dataset.synthetic_images import (
    DAMAGES,
    MAX_CLASSES,
    ODDITIES,
    TYPICAL_WIDTH,
    Box,
    add_noise,
    class_look,
    draw_size,
    encode,
    render,
)
from pipeline.dataset.workers import available_cores, map_in_order
from pipeline.errors import UserError
from pipeline.progress import Progress

MARKER = "synthetic.json"  #: holds the settings; tells a made-up tree from a real one
CHUNK = 16  # images a task
SMALL = 8_000_000  # pixels in all, below which starting processes costs more than it saves


@dataclass(frozen=True)
class Settings:
    """What the bytes of a tree depend on. `size`: typical width in pixels; `mean_bytes`: of a file, None: as it comes.

    `oddities` and `damaged`: number of training images that are odd or broken; as large a share of the validation set.
    """

    classes: int = 10
    train_per_class: int = 40
    val_per_class: int = 10
    seed: int = 0
    size: int = TYPICAL_WIDTH
    mean_bytes: int | None = None
    oddities: int = 10
    damaged: int = 0

    def __post_init__(self):
        images = self.classes * self.train_per_class
        limits = {
            "classes": (1, MAX_CLASSES),
            "train_per_class": (1, 10_000_000),
            "val_per_class": (0, 10_000_000),
            "seed": (0, 2**63 - 1),
            "size": (16, 4000),
            "oddities": (0, images),
            "damaged": (0, images - self.oddities),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name} is {value}; give a number from {low} to {high}")


@dataclass(frozen=True)
class Sample:
    """One image to be: `number` counts from 1, inside its class (train) or the whole split (val, test)."""

    split: str
    label: int
    number: int
    kind: str | None = None  # of oddity or damage

    @property
    def name(self) -> str:
        """File name without suffix, as in the archive."""
        if self.split == "train":
            return f"{synset(self.label)}_{self.number}"
        return f"ILSVRC2012_{self.split}_{self.number:08d}"

    @property
    def place(self) -> str:
        """Path below `ILSVRC/Data/CLS-LOC` (images) or `ILSVRC/Annotations/CLS-LOC` (boxes), without suffix."""
        return f"train/{synset(self.label)}/{self.name}" if self.split == "train" else f"{self.split}/{self.name}"


@dataclass(frozen=True)
class Recipe:
    """How the pixels become a file."""

    size: int
    seed: int
    noise: float
    quality: int


def synset(label: int) -> str:
    """Made-up synset of a class; no real one begins with n99."""
    return f"n99{label:06d}"


def _spread(number: int, among: int) -> list[int]:
    """`number` places spread evenly over range(among)."""
    return [(2 * i + 1) * among // (2 * number) for i in range(number)]


def list_samples(settings: Settings, split: str) -> list[Sample]:
    """Every image of "train" or "val", in the order of its file names; validation labels are shuffled by the seed."""
    classes = settings.classes
    if split == "train":
        places = [(label, number) for label in range(classes) for number in range(1, settings.train_per_class + 1)]
    else:
        labels = np.repeat(np.arange(classes), settings.val_per_class)
        np.random.default_rng([settings.seed, 2]).shuffle(labels)
        places = [(int(label), number) for number, label in enumerate(labels, 1)]
    share = len(places) / (classes * settings.train_per_class)
    odd, damaged = round(settings.oddities * share), round(settings.damaged * share)
    special = _spread(odd + damaged, len(places))
    turns = set(_spread(damaged, len(special)))
    kinds, given = {}, {True: 0, False: 0}
    for turn, place in enumerate(special):
        broken = turn in turns
        cycle = DAMAGES if broken else ODDITIES
        kinds[place] = cycle[given[broken] % len(cycle)]
        given[broken] += 1
    return [Sample(split, label, number, kinds.get(i)) for i, (label, number) in enumerate(places)]


def _draw(sample: Sample, recipe: Recipe) -> tuple[np.ndarray, list[Box], np.random.Generator]:
    split = ("train", "val", "test").index(sample.split)
    rng = np.random.default_rng([recipe.seed, split, sample.label, sample.number])
    width, height = draw_size(rng, recipe.size)
    pixels, boxes = render(class_look(sample.label), rng, width, height)
    return pixels, boxes, rng


def make_image(sample: Sample, recipe: Recipe) -> tuple[bytes, tuple[int, int], list[Box]]:
    """A sample's bytes, its (width, height) before any oddity, and the boxes of its objects."""
    pixels, boxes, rng = _draw(sample, recipe)
    data = encode(add_noise(pixels, rng, recipe.noise), recipe.quality, sample.kind)
    return data, (pixels.shape[1], pixels.shape[0]), boxes


def choose_recipe(settings: Settings) -> Recipe:
    """The recipe for `settings`; for `mean_bytes`, the noise is found by bisection on a few images.

    Raises UserError for a mean that noise alone can't reach at this size.
    """
    if settings.mean_bytes is None:
        return Recipe(settings.size, settings.seed, 6.0, 85)
    quality, low, high = 90, 0.0, 64.0
    samples = [Sample("train", i % settings.classes, 1 + i) for i in range(32)]
    drawn = [_draw(sample, Recipe(settings.size, settings.seed, 0, quality)) for sample in samples]
    states = [rng.bit_generator.state for _, _, rng in drawn]

    def mean_bytes(noise: float) -> float:
        total = 0
        for (pixels, _, rng), state in zip(drawn, states, strict=True):
            rng.bit_generator.state = state
            total += len(encode(add_noise(pixels, rng, noise), quality))
        return total / len(drawn)

    if not mean_bytes(low) <= settings.mean_bytes <= mean_bytes(high):
        least, most = round(mean_bytes(low), -2), round(mean_bytes(high), -2)
        raise UserError(
            f"mean_bytes is {settings.mean_bytes}; at size {settings.size} give {least:.0f} to {most:.0f}, "
            "or change the size"
        )
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (low, middle) if mean_bytes(middle) > settings.mean_bytes else (middle, high)
    return Recipe(settings.size, settings.seed, high, quality)


def _annotation(sample: Sample, size: tuple[int, int], boxes: list[Box]) -> str:
    objects = "".join(
        f"\t<object>\n\t\t<name>{synset(sample.label)}</name>\n\t\t<pose>Unspecified</pose>\n"
        "\t\t<truncated>0</truncated>\n\t\t<difficult>0</difficult>\n\t\t<bndbox>\n"
        f"\t\t\t<xmin>{x1}</xmin>\n\t\t\t<ymin>{y1}</ymin>\n\t\t\t<xmax>{x2}</xmax>\n\t\t\t<ymax>{y2}</ymax>\n"
        "\t\t</bndbox>\n\t</object>\n"
        for x1, y1, x2, y2 in boxes
    )
    folder = synset(sample.label) if sample.split == "train" else "val"
    return (
        f"<annotation>\n\t<folder>{folder}</folder>\n\t<filename>{sample.name}</filename>\n"
        "\t<source>\n\t\t<database>synthetic</database>\n\t</source>\n"
        f"\t<size>\n\t\t<width>{size[0]}</width>\n\t\t<height>{size[1]}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
        f"\t<segmented>0</segmented>\n{objects}</annotation>\n"
    )


def has_boxes(sample: Sample) -> bool:
    """Boxes cover the validation set and, as in the real archive, a part of the training set only."""
    return sample.split == "val" or sample.number % 2 == 1


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def _write_images(task: tuple[Path, list[Sample], Recipe]) -> list[tuple[str, str] | None]:
    """Write a chunk of images and their annotations; a row of the solution CSV for each that has boxes."""
    root, samples, recipe = task
    rows = []
    for sample in samples:
        data, size, boxes = make_image(sample, recipe)
        _write(root / imagenet.CLS_LOC / f"{sample.place}.JPEG", data)
        if not has_boxes(sample):
            rows.append(None)
            continue
        annotation = _annotation(sample, size, boxes).encode()
        _write(root / "ILSVRC/Annotations/CLS-LOC" / f"{sample.place}.xml", annotation)
        words = "".join(f"{synset(sample.label)} {' '.join(map(str, box))} " for box in boxes)
        rows.append((sample.name, words))
    return rows


def _chunks(root: Path, samples: list[Sample], recipe: Recipe) -> Iterator[tuple[Path, list[Sample], Recipe]]:
    for i in range(0, len(samples), CHUNK):
        yield root, samples[i : i + CHUNK], recipe


def _write_lists(root: Path, settings: Settings, rows: dict[str, list[tuple[str, str]]]) -> None:
    """The archive's own lists: words, solutions (validation rows unsorted, as in the real one), image sets."""
    mapping = "".join(f"{synset(label)} {class_look(label).words}\n" for label in range(settings.classes))
    _write(root / imagenet.SYNSET_MAPPING, mapping.encode())
    for split, of_split in rows.items():
        order = np.random.default_rng([settings.seed, 3]).permutation(len(of_split))
        lines = "".join(f"{of_split[i][0]},{of_split[i][1]}\n" for i in order)
        _write(root / f"LOC_{split}_solution.csv", f"ImageId,PredictionString\n{lines}".encode())
    sets = root / "ILSVRC/ImageSets/CLS-LOC"
    sets.mkdir(parents=True, exist_ok=True)
    train = list_samples(settings, "train")
    lines = (f"{synset(s.label)}/{s.name} {i}\n" for i, s in enumerate(train, 1))
    _write(sets / "train_cls.txt", "".join(lines).encode())
    boxed = [s for s in train if has_boxes(s)]
    lines = (f"{synset(s.label)}/{s.name} {i}\n" for i, s in enumerate(boxed, 1))
    _write(sets / "train_loc.txt", "".join(lines).encode())
    lines = (f"{s.name} {s.number}\n" for s in list_samples(settings, "val"))
    _write(sets / "val.txt", "".join(lines).encode())


def _read_marker(root: Path) -> dict | None:
    """The marker of an earlier run; None for a new folder. UserError for a folder that is not ours to write into."""
    try:
        return json.loads((root / MARKER).read_bytes())
    except FileNotFoundError:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root} exists and holds something else; give a new or empty folder") from None
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{root / MARKER} can't be read ({error}); remove {root} or give another folder") from error


def is_whole(root: Path, settings: Settings) -> bool:
    """Is every image of `settings` there, in the archive's layout or sorted by valprep?"""
    base = root / imagenet.CLS_LOC
    return all(
        (base / f"{s.place}.JPEG").is_file() or (base / s.split / synset(s.label) / f"{s.name}.JPEG").is_file()
        for split in ("train", "val")
        for s in list_samples(settings, split)
    )


def generate_tree(root: Path, settings: Settings, processes: int | None = None, quiet: bool = True) -> bool:
    """Write the tree of `settings` into `root`; False if it was all there already.

    Raises UserError for a folder that holds something else or another tree, or that can't be written.
    """
    marker = _read_marker(root)
    wanted = asdict(settings)
    if marker is not None:
        found = marker.get("settings", {})
        differing = [f"{name} {found.get(name)} instead of {value}" for name, value in wanted.items()]
        differing = [text for text, name in zip(differing, wanted, strict=True) if found.get(name) != wanted[name]]
        if differing:
            raise UserError(f"{root} holds another synthetic set ({differing[0]}); give another folder or remove it")
        if marker.get("complete") and is_whole(root, settings):
            return False
    recipe = choose_recipe(settings)
    samples = {split: list_samples(settings, split) for split in ("train", "val")}
    number = sum(map(len, samples.values()))
    if number * settings.size**2 < SMALL:
        processes = 1
    rows: dict[str, list[tuple[str, str]]] = {}
    try:
        root.mkdir(parents=True, exist_ok=True)
        _write(root / MARKER, json.dumps({"settings": wanted, "complete": False}, indent=1).encode())
        for base in (root / imagenet.CLS_LOC, root / "ILSVRC/Annotations/CLS-LOC"):
            (base / "val").mkdir(parents=True, exist_ok=True)
            for label in range(settings.classes):
                (base / "train" / synset(label)).mkdir(parents=True, exist_ok=True)
        with Progress("Generating", number, "images", quiet=quiet) as progress:
            for split, of_split in samples.items():
                rows[split] = []
                tasks = _chunks(root, of_split, recipe)
                for made in map_in_order(_write_images, tasks, processes or available_cores()):
                    rows[split] += (row for row in made if row)
                    progress.advance(len(made))
        _write_lists(root, settings, rows)
        _write(root / MARKER, json.dumps({"settings": wanted, "complete": True}, indent=1).encode())
    except OSError as error:
        raise UserError(f"can't write into {root} ({error.strerror}); give another folder") from error
    return True


def synth(
    dest: str,
    classes: int = 10,
    train_per_class: int = 40,
    val_per_class: int = 10,
    seed: int = 0,
    size: int = TYPICAL_WIDTH,
    mean_bytes: int | None = None,
    oddities: int = 10,
    damaged: int = 0,
    kaggle_zip: str | None = None,
    nested: bool = False,
    test_images: int = 8,
    processes: int | None = None,
) -> int:
    """Generate a small ImageNet-shaped data set (the ILSVRC tree and its lists) to try things on.

    Args:
        dest: folder to write; a second run with the same settings reuses it.
        classes: number of classes.
        train_per_class: training images a class.
        val_per_class: validation images a class.
        seed: the same seed gives the same bytes.
        size: typical width in pixels (the real set's: 470); sizes are spread around it.
        mean_bytes: mean bytes of a file (the real set's: 110000); default: whatever comes out.
        oddities: training images that are odd as some real ones are: grayscale, CMYK, PNG, EXIF.
        damaged: training images that can't be decoded, to test how that is met.
        kaggle_zip: also write an archive as Kaggle serves it into this file.
        nested: that archive holds a tar.gz with the images, as older ones do.
        test_images: images of the test split in that archive.
        processes: number of processes; default: all cores.
    """
    root = Path(dest)
    settings = Settings(classes, train_per_class, val_per_class, seed, size, mean_bytes, oddities, damaged)
    made = generate_tree(root, settings, processes, quiet=False)
    counts = f"{classes * train_per_class:,} train and {classes * val_per_class:,} val images of {classes} classes"
    print(f"{root}: {counts}{'' if made else ', already there'}")
    if kaggle_zip:
        from pipeline.dataset.synthetic_archive import write_kaggle_zip

        path = Path(kaggle_zip)
        members = write_kaggle_zip(root, path, test_images=test_images, nested=nested, quiet=False)
        print(f"{path}: {members:,} members, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def main(argv: list[str]) -> int:
    return run_command(synth, "synth", argv)
