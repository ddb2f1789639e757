"""The groups `optim` and `schedule`: how the weights are changed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Check, at_least_zero, positive, share


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are changed, and the loss."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    """Peak learning rate; see lr_batch_size."""
    lr_batch_size: int | None = 256
    """The global batch that `lr` is meant for: the rate is scaled linearly to train.global_batch_size
    (Goyal et al. 2017). None: `lr` is used as it stands."""
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's denominator term."""
    weight_decay: float = 1e-4
    norm_weight_decay: float = 0.0
    """Weight decay of normalisation layers and biases."""
    body_lr: float = 1.0
    """Factor of the learning rate for all but the head."""
    l1: float = 0.0
    """Adds l1 * sum |w| over all trained parameters to the loss."""
    l2: float = 0.0
    """Adds l2 / 2 * sum w^2 over all trained parameters to the loss."""
    label_smoothing: float = 0.0


def check_optim(c: OptimConfig) -> Iterator[Check]:
    """Impossible values of the group `optim`."""
    yield positive("optim.lr", c.lr)
    yield positive("optim.lr_batch_size", c.lr_batch_size, optional=True)
    yield "optim.momentum", c.momentum, 0 <= c.momentum < 1, "give a number from 0 to below 1"
    nesterov = not c.nesterov or c.momentum > 0
    yield "optim.nesterov", c.nesterov, nesterov, "give optim.momentum above 0, or leave nesterov off"
    yield (
        "optim.betas",
        list(c.betas),
        all(0 <= b < 1 for b in c.betas),
        "give two numbers from 0 to below 1",
    )
    yield positive("optim.eps", c.eps)
    yield at_least_zero("optim.weight_decay", c.weight_decay)
    yield at_least_zero("optim.norm_weight_decay", c.norm_weight_decay)
    yield positive("optim.body_lr", c.body_lr)
    yield at_least_zero("optim.l1", c.l1)
    yield at_least_zero("optim.l2", c.l2)
    smoothing = c.label_smoothing
    yield "optim.label_smoothing", smoothing, 0 <= smoothing < 1, "give a number from 0 to below 1"


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["step", "cosine", "constant"] = "step"
    epochs: float = 90.0
    warmup_epochs: float = 0.0
    """Linear warm-up, step by step, from warmup_start to the peak."""
    warmup_start: float = 0.1
    """Learning rate of the first step as a share of the peak."""
    milestones: tuple[float, ...] = (30.0, 60.0)
    """step: epochs at which the rate is multiplied by gamma."""
    gamma: float = 0.1
    min_lr: float = 0.0
    """cosine: learning rate at the end."""


def check_schedule(c: ScheduleConfig) -> Iterator[Check]:
    """Impossible values of the group `schedule`."""
    yield positive("schedule.epochs", c.epochs)
    warmup = c.warmup_epochs
    yield "schedule.warmup_epochs", warmup, 0 <= warmup < c.epochs, "give 0 or more, below schedule.epochs"
    yield share("schedule.warmup_start", c.warmup_start)
    yield positive("schedule.gamma", c.gamma)
    yield at_least_zero("schedule.min_lr", c.min_lr)
    milestones = list(c.milestones)
    rising = milestones == sorted(set(milestones)) and min(milestones, default=1) > 0
    yield "schedule.milestones", milestones, rising, "give rising epochs above 0"
