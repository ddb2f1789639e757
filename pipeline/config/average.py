"""The groups `ema` and `evaluation`: the average of the weights, and how both are scored."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.fields import Check, at_least_zero, below_one, positive
from pipeline.config.time import REMEDY, Time, is_time, plain_time


@dataclass(frozen=True)
class EmaConfig:
    """An average of the weights and BatchNorm's statistics, scored beside the weights themselves: an exponential moving
    one (`decay`), or the plain mean over the end of the run (`last_epochs`)."""

    decay: float = 0.0
    """What a step of `batch_size` images leaves of the average as it was: 0.9999 averages over some 10,000 such steps.
    0: no average. With other steps and every k-th of them it is decay ** (k * train.global_batch_size / batch_size), so
    that it reaches back over the same number of images. Until the warm-up is over it is a copy of the weights."""
    batch_size: int = 1024
    """The global batch that `decay` is meant for."""
    every_steps: int = 1
    """Average whenever this many steps are done."""
    last_epochs: Time | None = None
    """Instead of decay: the mean of the weights after every `every_steps` steps of the run's last epochs, as many as
    given here (Izmailov et al. 2018, arXiv 1803.05407); before, a copy of the weights."""

    def __post_init__(self) -> None:
        if self.last_epochs is not None:
            object.__setattr__(self, "last_epochs", plain_time(self.last_epochs))

    @property
    def averages(self) -> bool:
        """Is there an average of the weights?"""
        return self.decay > 0 or self.last_epochs is not None


def check_ema(c: EmaConfig) -> Iterator[Check]:
    """Impossible values of the group `ema`."""
    yield below_one("ema.decay", c.decay)
    yield positive("ema.batch_size", c.batch_size)
    yield positive("ema.every_steps", c.every_steps)
    if c.last_epochs is not None:
        yield "ema.last_epochs", c.last_epochs, is_time(c.last_epochs, above=True), f"{REMEDY}, above 0"
        yield "ema.last_epochs", c.last_epochs, c.decay == 0, f"ema.decay is {c.decay}; give one of them"


@dataclass(frozen=True)
class EvaluationConfig:
    """How the network is scored on the validation set, while it is trained and after."""

    flip: bool = False
    """Score the mean of the logits of each image and its mirror image (as FFCV)."""
    recalibrate_batches: int = 0
    """Before scoring, recompute BatchNorm's statistics over the images of this many of the last training batches, cut
    and flipped but not augmented, with the weights as they are; training continues with its own. 0: score with the
    running statistics."""


def check_evaluation(c: EvaluationConfig) -> Iterator[Check]:
    """Impossible values of the group `evaluation`."""
    yield at_least_zero("evaluation.recalibrate_batches", c.recalibrate_batches)
