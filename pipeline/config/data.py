"""The group `data`: where the samples are, and what is cut from them."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Check, at_least_zero, at_most, positive, runtime_field, share
from pipeline.config.model import INPUT_SIZES
from pipeline.config.networks import preprocessing_of
from pipeline.errors import UserError
from pipeline.limits import MOST_CORES

MOST_PREFETCH = 1000  #: batches; hundreds fill the memory of most nodes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  #: of ImageNet, as most published weights expect them


@dataclass(frozen=True)
class DataConfig:
    """The data set, decoding and cropping."""

    root: str = runtime_field("")
    """Data root: an ILSVRC root, or a folder with train/ and val/ (or test/), or packed shards."""
    index: str | None = runtime_field(None)
    """Folder of the index; default ROOT/index."""
    loader: Literal["auto", "dali", "reference"] = runtime_field("auto")
    """DALI, or torch and torchvision (slower, same batches); auto: DALI where it is installed."""
    decode: Literal["cpu", "mixed"] = "cpu"
    """mixed: DALI decodes JPEGs on the GPU, for nodes with few cores. Its pixels differ a little from the CPU's, and
    from GPU to GPU, so it is part of the run; scores on a CPU are then of the CPU's pixels."""
    image_size: int | None = None
    """Pixels of a training image's side; default: what the network was made for (299 for Inception v3, else mostly
    224)."""
    start_size: int | None = None
    """Progressive resizing: pixels of a training image's side until the ramp; image_size after it."""
    ramp_epochs: tuple[float, float] | None = None
    """Progressive resizing: the epochs at which the side begins and ends to grow; it changes between epochs, in
    multiples of 32 pixels."""
    val_size: int | None = None
    """Pixels of a validation image's side, cropped from the middle; default: image_size."""
    val_resize: int | None = None
    """Pixels that a validation image's shorter side is resized to before the crop; default: val_size * 256 / 224."""
    val_crop_ratio: float | None = None
    """The same as a share: val_resize is val_size / val_crop_ratio, rounded down (timm's crop_pct)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How images are resized (always with antialiasing), in training and validation; default: as timm says of its
    network, else bilinear."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """RandomResizedCrop: smallest and largest share of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """RandomResizedCrop: smallest and largest width / height."""
    shorter_side: tuple[int, int] | None = None
    """Instead of RandomResizedCrop: resize the image so that its shorter side has a whole number of pixels drawn from
    this range, then crop image_size pixels at a random place (He et al. 2015)."""
    pad_crop: int | None = None
    """Instead of RandomResizedCrop: resize the image so that its shorter side has image_size pixels, pad it by this
    many pixels on every side with augment.fill (default: black), and crop image_size pixels at a random place."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    alternate_flips: bool = False
    """Flip each image every other time it is seen: a random half of them in the first epoch, the others in the second,
    and so on (Jordan 2024, arXiv 2404.00498); default: each time by chance."""
    mean: tuple[float, float, float] | None = None
    """Subtracted from each channel (red, green, blue; 0 to 1), in the step; default: what the network was made for,
    else ImageNet's, 0.485, 0.456, 0.406."""
    std: tuple[float, float, float] | None = None
    """Each channel is divided by this, in the step; default: what the network was made for, else ImageNet's, 0.229,
    0.224, 0.225."""
    threads: int | None = runtime_field(None)
    """Decoding threads of a rank; default: this rank's share of the cores."""
    prefetch: int = runtime_field(2)
    """Batches decoded ahead of the step."""
    max_unreadable: int = runtime_field(100)
    """Samples that may turn out unreadable at run time before the run stops: training samples (each is substituted) and
    validation images (left out of the scores, which say so)."""

    def resolve(self, model: str = "") -> "ResolvedDataConfig":
        """The same with every size as a number of pixels. model: the network's name, whose own values are defaults.

        Raises UserError for a val_crop_ratio that is impossible, or given beside val_resize.
        """
        left_open = (self.image_size, self.val_crop_ratio or self.val_resize, self.mean, self.std, self.interpolation)
        made_for = preprocessing_of(model) if None in left_open else {}  # a run's own file opens where its code is not
        image_size, val_size, val_resize = self.image_size, self.val_size, self.val_resize  # 0 is refused by the checks
        if image_size is None:
            image_size = made_for.get("image_size") or INPUT_SIZES.get(model, 224)
        val_size = image_size if val_size is None else val_size
        val_resize = round(val_size * 256 / 224) if val_resize is None else val_resize
        ratio = self.val_crop_ratio
        if ratio is not None:
            if not 0 < ratio <= 1:
                raise UserError(f"--data.val_crop_ratio is {ratio}: give a number above 0, at most 1")
            if self.val_resize is not None:
                raise UserError(
                    f"--data.val_crop_ratio is {ratio}: data.val_resize is {self.val_resize}; give one, the other null"
                )
            val_resize = int(val_size / ratio)
        elif self.val_resize is None and "val_crop_ratio" in made_for:
            val_resize = int(val_size / made_for["val_crop_ratio"])
        seen = {
            "mean": self.mean or made_for.get("mean", MEAN),
            "std": self.std or made_for.get("std", STD),
            "interpolation": self.interpolation or made_for.get("interpolation", "bilinear"),
        }
        sizes = {"image_size": image_size, "val_size": val_size, "val_resize": val_resize, "val_crop_ratio": None}
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return ResolvedDataConfig(**(given | sizes | seen))


@dataclass(frozen=True, kw_only=True)
class ResolvedDataConfig(DataConfig):
    """The group `data` of a run: every size is a number of pixels. Made by `DataConfig.resolve`."""

    image_size: int
    val_size: int
    val_resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def size_at(self, epoch: int) -> int:
        """Pixels of a training image's side in an epoch (0: the first). Between the epochs of the ramp it grows
        linearly, rounded to a multiple of 32 (half to even), as in FFCV's ImageNet recipes; never beyond image_size."""
        if self.start_size is None or self.ramp_epochs is None:
            return self.image_size
        first, last = self.ramp_epochs
        if epoch <= first:
            return self.start_size
        if epoch >= last:
            return self.image_size
        exact = self.start_size + (self.image_size - self.start_size) * (epoch - first) / (last - first)
        return min(max(32 * round(exact / 32), self.start_size), self.image_size)

    def sizes(self) -> list[int]:
        """All sizes that a training image's side may have, rising."""
        if self.ramp_epochs is None:
            return [self.image_size]
        first, last = self.ramp_epochs
        return sorted({self.size_at(epoch) for epoch in (0, *range(math.floor(first), math.ceil(last) + 2))})


def check_data(c: ResolvedDataConfig) -> Iterator[Check]:
    """Impossible values of the group `data`."""
    yield positive("data.image_size", c.image_size)
    yield (
        "data.start_size",
        c.start_size,
        (c.start_size is None) == (c.ramp_epochs is None),
        "give data.start_size and data.ramp_epochs, or neither",
    )
    if c.start_size is not None and c.ramp_epochs is not None:
        small = 0 < c.start_size <= c.image_size
        yield "data.start_size", c.start_size, small, f"give 1 to data.image_size {c.image_size}"
        first, last = c.ramp_epochs
        yield "data.ramp_epochs", [first, last], 0 <= first <= last < math.inf, "give two epochs, 0 <= first <= last"
    yield positive("data.val_size", c.val_size)
    yield "data.val_resize", c.val_resize, c.val_resize >= c.val_size, "give at least data.val_size"
    low, high = c.crop_area
    yield (
        "data.crop_area",
        [low, high],
        0 < low <= high <= 1,
        "give two shares of the area, 0 < smallest <= largest <= 1",
    )
    low, high = c.crop_ratio
    yield "data.crop_ratio", [low, high], 0 < low <= high < math.inf, "give two ratios, 0 < smallest <= largest"
    if c.shorter_side is not None:
        low, high = c.shorter_side
        good = c.image_size <= low <= high and c.start_size is None
        yield (
            "data.shorter_side",
            [low, high],
            good,
            f"give two sizes, data.image_size {c.image_size} <= smallest <= largest, and no data.start_size",
        )
    if c.pad_crop is not None:
        alone = c.shorter_side is None and c.start_size is None
        good = 0 < c.pad_crop < c.image_size and alone
        remedy = f"give 1 to below data.image_size {c.image_size}, and no data.shorter_side or data.start_size"
        yield "data.pad_crop", c.pad_crop, good, remedy
    yield share("data.flip", c.flip)
    half = c.flip == 0.5 or not c.alternate_flips
    yield "data.alternate_flips", True, half, f"it flips half of the images, data.flip is {c.flip}; leave that out"
    as_shares = "pixel values are scaled to 0 to 1: divide those of 0 to 255 by 255"
    yield (
        "data.mean",
        list(c.mean),
        all(abs(mean) <= 1 for mean in c.mean),
        f"give three numbers of at most 1 ({as_shares})",
    )
    good = all(0 < std <= 1 for std in c.std)
    yield "data.std", list(c.std), good, f"give three numbers above 0 and at most 1 ({as_shares})"
    yield at_most(
        "data.threads", c.threads, MOST_CORES, "threads beyond the rank's cores decode no faster", optional=True
    )
    yield at_most("data.prefetch", c.prefetch, MOST_PREFETCH, "each is a batch in memory")
    yield at_least_zero("data.max_unreadable", c.max_unreadable)
