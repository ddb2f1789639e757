"""The list of synthetic images and the content of each: functions of the settings alone."""

from dataclasses import dataclass

import numpy as np

from pipeline.dataset.synthetic.images import (
    DAMAGES,
    MAX_CLASSES,
    ODDITIES,
    TYPICAL_WIDTH,
    Box,
    add_noise,
    class_style,
    draw_size,
    encode,
    render,
)
from pipeline.errors import UserError

MARKER = "synthetic.json"  #: holds the settings; marks a tree as synthetic


@dataclass(frozen=True)
class Settings:
    """What the bytes of a tree depend on. `size`: typical width in pixels; `mean_bytes`: of a file, None: any.

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

    def __post_init__(self) -> None:
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
    """One image: `number` counts from 1, inside its class (train) or the whole split (val, test)."""

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
    """Synthetic synset of a class; no real one begins with n99."""
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
    pixels, boxes = render(class_style(sample.label), rng, width, height)
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


def has_boxes(sample: Sample) -> bool:
    """Boxes cover the validation set and, as in the real archive, a part of the training set only."""
    return sample.split == "val" or sample.number % 2 == 1
