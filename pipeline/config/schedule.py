"""The group `schedule`: the learning rate over the run, as a function of the step."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Check, at_least_zero, positive, share
from pipeline.config.time import REMEDY, Time, is_time, parse_time, plain_time


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run. Times are epochs (90, "90ep") or batches ("5000ba").

    A run of another length than its recipe (`--schedule.epochs`) follows the recipe's curve in its own time: milestones
    move in proportion, and the warm-up shrinks with a shorter run but does not grow with a longer one.
    """

    name: Literal["step", "multistep", "cosine", "linear", "polynomial", "one_cycle", "constant"] = "step"
    """After the warm-up: step: times gamma every step_every, or as multistep; multistep: times gamma at each milestone;
    cosine, linear, polynomial: down to min_lr at the end; one_cycle: as cosine, the warm-up too, which is 30 percent of
    the run unless given (Smith 2018); constant."""
    epochs: Time = 90.0
    """Length of the run."""
    reference_epochs: Time | None = None
    """Length of the run that milestones and warm-up are given for; default: epochs, or what the recipe says where the
    command line gives other epochs."""
    warmup_epochs: Time = 0.0
    """Warm-up, step by step, from warmup_start to the peak."""
    warmup: Literal["linear", "exponential"] = "linear"
    """exponential: each step multiplies the rate by the same factor."""
    warmup_start: float = 0.1
    """Learning rate of the first step as a share of the peak."""
    milestones: tuple[Time, ...] = (30.0, 60.0)
    """step, multistep: times at which the rate is multiplied by gamma, from the run's beginning."""
    step_every: Time | None = None
    """step: the rate is multiplied by gamma whenever this much time has passed, instead of at the milestones."""
    gamma: float = 0.1
    """step, multistep: factor of the rate at each milestone, or every step_every."""
    power: float = 2.0
    """polynomial: the rate falls as (share of the run that is left) ** power."""
    per_epoch: bool = False
    """Change the rate once an epoch, to its value at the epoch's beginning (torchvision's references, timm); default:
    at every step."""
    warmup_reaches_peak: bool = False
    """per_epoch: the last epoch of the warm-up is at the peak already: epoch e of w has the share (e + 1) / w (NVIDIA
    DeepLearningExamples); default: e / w."""
    decay_from_start: bool = False
    """cosine, linear, polynomial: the curve begins at step 0 and the warm-up covers its first part (timm); default: it
    begins where the warm-up ends."""
    min_lr: float = 0.0
    """cosine, linear, polynomial, one_cycle: learning rate at the end."""
    begin: Time = 0.0
    """What an earlier run has trained (`pipeline continue`): warm-up and curve begin here, and milestones count from
    here; `epochs` is the length of both together."""

    def __post_init__(self) -> None:
        for name in ("epochs", "reference_epochs", "warmup_epochs", "step_every", "begin"):
            object.__setattr__(self, name, plain_time(getattr(self, name)))
        object.__setattr__(self, "milestones", tuple(map(plain_time, self.milestones)))
        if self.reference_epochs == self.epochs:
            object.__setattr__(self, "reference_epochs", None)


def check_schedule(c: ScheduleConfig) -> Iterator[Check]:
    """Impossible values of the group `schedule`."""
    yield "schedule.epochs", c.epochs, is_time(c.epochs, above=True), f"{REMEDY}, above 0"
    yield (
        "schedule.reference_epochs",
        c.reference_epochs,
        c.reference_epochs is None or is_time(c.reference_epochs, above=True),
        REMEDY,
    )
    yield "schedule.warmup_epochs", c.warmup_epochs, is_time(c.warmup_epochs), f"{REMEDY}, 0 or more"
    (warmup, unit), (epochs, other) = parse_time(c.warmup_epochs), parse_time(c.reference_epochs or c.epochs)
    shorter = warmup < epochs or unit != other
    yield "schedule.warmup_epochs", c.warmup_epochs, shorter, "give 0 or more, below schedule.epochs"
    good = is_time(c.begin)
    if good:
        (begin, unit), (epochs, other) = parse_time(c.begin), parse_time(c.epochs)
        good = begin < epochs or unit != other
    yield "schedule.begin", c.begin, good, "give 0 or more, below schedule.epochs"
    yield share("schedule.warmup_start", c.warmup_start)
    from_nothing = c.warmup == "exponential" and c.warmup_start == 0
    yield "schedule.warmup_start", c.warmup_start, not from_nothing, "an exponential warm-up starts above 0"
    yield positive("schedule.gamma", c.gamma)
    yield positive("schedule.power", c.power)
    yield at_least_zero("schedule.min_lr", c.min_lr)
    shifted = c.warmup_reaches_peak and not c.per_epoch
    yield "schedule.warmup_reaches_peak", True, not shifted, "it is for schedule.per_epoch true; leave it out"
    milestones = list(c.milestones)
    good = all(is_time(item, above=True) for item in milestones)
    yield "schedule.milestones", milestones, good, f"{REMEDY}, each above 0"
    times = [parse_time(item) for item in milestones]
    rising = all(a[0] < b[0] or a[1] != b[1] for a, b in itertools.pairwise(times))
    yield "schedule.milestones", milestones, rising, "give rising times above 0"
    yield "schedule.step_every", c.step_every, c.step_every is None or is_time(c.step_every, above=True), REMEDY
    of_no_use = c.step_every is not None and c.name != "step"
    yield "schedule.step_every", c.step_every, not of_no_use, f"it is for --schedule.name step, not {c.name}; leave out"
