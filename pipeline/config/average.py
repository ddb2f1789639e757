"""The groups `ema` and `evaluation`: the average of the weights, and how both are scored."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config.fields import Check, at_least_zero, below_one, positive


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the weights and BatchNorm's statistics, scored beside the weights themselves."""

    decay: float = 0.0
    """What a step of `batch_size` images leaves of the average as it was: 0.9999 averages over some 10,000 such steps.
    0: no average. With other steps and every k-th of them it is decay ** (k * train.global_batch_size / batch_size), so
    that it reaches back over the same number of images. Until the warm-up is over it is a copy of the weights."""
    batch_size: int = 1024
    """The global batch that `decay` is meant for."""
    every_steps: int = 1
    """Average whenever this many steps are done."""


def check_ema(c: EmaConfig) -> Iterator[Check]:
    """Impossible values of the group `ema`."""
    yield below_one("ema.decay", c.decay)
    yield positive("ema.batch_size", c.batch_size)
    yield positive("ema.every_steps", c.every_steps)


@dataclass(frozen=True)
class EvaluationConfig:
    """How the network is scored on the validation set, while it is trained and after."""

    flip: bool = False
    """Score the mean of the logits of each image and its mirror image (as FFCV)."""
    recalibrate_batches: int = 0
    """Before scoring, compute BatchNorm's statistics anew over so many of the last training batches, with the weights
    as they are; training continues with its own. 0: score with the running statistics."""


def check_evaluation(c: EvaluationConfig) -> Iterator[Check]:
    """Impossible values of the group `evaluation`."""
    yield at_least_zero("evaluation.recalibrate_batches", c.recalibrate_batches)
