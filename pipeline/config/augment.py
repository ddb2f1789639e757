"""The group `augment`: what is done to training images after the crop and the flip, and how they are mixed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Check, at_least_zero, positive, share

#: the largest magnitude of the policies that have one
MAGNITUDES = {"randaugment": 30, "randaugment-timm": 10}


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training images; each draw follows from the seed, the epoch and the image."""

    policy: Literal["none", "randaugment", "randaugment-timm", "trivialaugment", "autoaugment"] = "none"
    """Changes of color and geometry. randaugment, trivialaugment (wide), autoaugment (the ImageNet policy): with
    torchvision's ranges; randaugment-timm: timm's increasing ranges, each change made half of the times."""
    num_ops: int = 2
    """randaugment: changes drawn for an image (N)."""
    magnitude: float = 9.0
    """randaugment: strength of a change (M), 0 to 30; timm's 0 to 10."""
    magnitude_std: float = 0.0
    """randaugment: standard deviation of the strength (timm's mstd)."""
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "nearest"
    """How the policy's shears, shifts and rotations read pixels."""
    fill: tuple[int, int, int] | None = None
    """Fill color (0 to 255) of what shears, shifts and rotations uncover; default: black."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Color jitter of brightness, contrast, saturation (factors from 1 - x to 1 + x) and hue (-x to x of the color
    circle)."""
    random_erase: float = 0.0
    """Probability that a rectangle of an image is erased (random erasing)."""
    erase_area: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest share of the image that is erased."""
    erase_ratio: tuple[float, float] = (0.3, 3.3)
    """Smallest and largest height / width of the rectangle."""
    repeats: int = 1
    """Copies of a sample in a batch, each augmented independently (repeated augmentation). An epoch has as many steps
    as without, and sees one in `repeats` of the samples; `repeats` epochs see each of them `repeats` times."""
    mixup: float = 0.0
    """mixup: both parameters of the beta distribution of an image's share; 0: off."""
    cutmix: float = 0.0
    """CutMix: both parameters of the beta distribution of what remains of an image; 0: off."""
    mix_prob: float = 1.0
    """Probability that a group is mixed at all."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    mix_group: int = 2
    """Consecutive images of the global batch that share one draw, each mixed with the one before it in the group. Has
    to divide the images that a rank puts through the network at once. Published recipes mix within a GPU's batch."""

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def draws(self) -> bool:
        """Is anything drawn for each sample beside its window and flip?"""
        return self.policy != "none" or max(self.jitter) > 0 or self.random_erase > 0


#: only cropped and flipped
UNAUGMENTED = AugmentConfig()


def check_augment(c: AugmentConfig, global_batch_size: int, micro_batch_size: int | None) -> Iterator[Check]:
    """Impossible values of the group `augment`."""
    yield positive("augment.num_ops", c.num_ops)
    most = MAGNITUDES.get(c.policy, 30)
    yield "augment.magnitude", c.magnitude, 0 <= c.magnitude <= most, f"give a number from 0 to {most} for {c.policy}"
    yield at_least_zero("augment.magnitude_std", c.magnitude_std)
    color = c.fill is None or all(0 <= value <= 255 for value in c.fill)
    yield "augment.fill", c.fill and list(c.fill), color, "give three numbers from 0 to 255"
    good = min(c.jitter) >= 0 and max(c.jitter[:3]) < float("inf") and c.jitter[3] <= 0.5
    yield "augment.jitter", list(c.jitter), good, "give four numbers of 0 or more, the last (hue) 0.5 at most"
    yield share("augment.random_erase", c.random_erase)
    low, high = c.erase_area
    yield "augment.erase_area", [low, high], 0 < low <= high <= 1, "give two shares, 0 < smallest <= largest <= 1"
    low, high = c.erase_ratio
    yield "augment.erase_ratio", [low, high], 0 < low <= high < float("inf"), "give two ratios, 0 < smallest <= largest"
    yield positive("augment.repeats", c.repeats)
    copies = c.repeats <= max(1, global_batch_size // 2)
    yield "augment.repeats", c.repeats, copies, "give at most half of train.global_batch_size"
    yield at_least_zero("augment.mixup", c.mixup)
    yield at_least_zero("augment.cutmix", c.cutmix)
    yield share("augment.mix_prob", c.mix_prob)
    yield share("augment.mixup_switch_prob", c.mixup_switch_prob)
    group = c.mix_group
    yield "augment.mix_group", group, group >= 2, "give at least 2"
    if c.mixes:
        yield (
            "augment.mix_group",
            group,
            global_batch_size % group == 0,
            f"give a divisor of train.global_batch_size {global_batch_size}",
        )
        yield (
            "augment.mix_group",
            group,
            micro_batch_size is None or micro_batch_size % group == 0,
            f"give a divisor of train.micro_batch_size {micro_batch_size}, or another micro batch",
        )
