"""A synthetic ImageNet: the archive's own tree and lists, with images that a network can learn, in any size.

The same settings give the same bytes, file for file.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipeline.command import run_command
from pipeline.counts import count
from pipeline.dataset import imagenet
from pipeline.dataset.synthetic.images import TYPICAL_WIDTH, Box, class_style
from pipeline.dataset.synthetic.plan import (
    MARKER,
    Recipe,
    Sample,
    Settings,
    choose_recipe,
    has_boxes,
    list_samples,
    make_image,
    synset,
)
from pipeline.dataset.workers import map_in_order
from pipeline.errors import UserError
from pipeline.files import atomic_write
from pipeline.limits import available_cores
from pipeline.progress import Progress

CHUNK = 16  # images a task
SMALL = 8_000_000  # pixels in all, below which starting processes costs more than it saves


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


def _write(path: Path, data: str | bytes) -> None:
    """Atomic, but not flushed: the tree can be generated again."""
    atomic_write(path, data, durable=False)


def _write_images(task: tuple[Path, list[Sample], Recipe]) -> list[tuple[str, str] | None]:
    """Write a chunk of images and their annotations; a row of the solution CSV for each that has boxes."""
    root, samples, recipe = task
    rows: list[tuple[str, str] | None] = []
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
    mapping = "".join(f"{synset(label)} {class_style(label).words}\n" for label in range(settings.classes))
    _write(root / imagenet.SYNSET_MAPPING, mapping.encode())
    for split, of_split in rows.items():
        order = np.random.default_rng([settings.seed, 3]).permutation(len(of_split))
        lines = "".join(f"{of_split[i][0]},{of_split[i][1]}\n" for i in order)
        _write(root / f"LOC_{split}_solution.csv", f"ImageId,PredictionString\n{lines}".encode())
    sets = root / "ILSVRC/ImageSets/CLS-LOC"
    sets.mkdir(parents=True, exist_ok=True)
    train = list_samples(settings, "train")
    boxed = [s for s in train if has_boxes(s)]
    for name, listed in (("train_cls.txt", train), ("train_loc.txt", boxed)):
        _write(sets / name, "".join(f"{synset(s.label)}/{s.name} {i}\n" for i, s in enumerate(listed, 1)))
    _write(sets / "val.txt", "".join(f"{s.name} {s.number}\n" for s in list_samples(settings, "val")))


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
    """Does every image of `settings` exist, in the archive's layout or sorted by valprep?"""
    base = root / imagenet.CLS_LOC
    return all(
        (base / f"{s.place}.JPEG").is_file() or (base / s.split / synset(s.label) / f"{s.name}.JPEG").is_file()
        for split in ("train", "val")
        for s in list_samples(settings, split)
    )


def generate_tree(root: Path, settings: Settings, processes: int | None = None, quiet: bool = True) -> bool:
    """Write the tree of `settings` into `root`; False if it was complete already.

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
        damaged: training images that can't be decoded, to test how they are handled.
        kaggle_zip: also write an archive as Kaggle serves it into this file.
        nested: that archive holds a tar.gz with the images, as older ones do.
        test_images: images of the test split in that archive.
        processes: number of processes; default: all cores.
    """
    root = Path(dest)
    settings = Settings(classes, train_per_class, val_per_class, seed, size, mean_bytes, oddities, damaged)
    made = generate_tree(root, settings, processes, quiet=False)
    counts = (
        f"{classes * train_per_class:,} train and {classes * val_per_class:,} val images of {count(classes, 'class')}"
    )
    print(f"{root}: {counts}{'' if made else ', generated earlier'}")
    if kaggle_zip:
        from pipeline.dataset.synthetic.archive import write_kaggle_zip

        path = Path(kaggle_zip)
        members = write_kaggle_zip(root, path, test_images=test_images, nested=nested, quiet=False)
        print(f"{path}: {count(members, 'member')}, {path.stat().st_size / 1e6:,.1f} MB")
    return 0


def main(argv: list[str]) -> int:
    return run_command(synth, "synth", argv)
