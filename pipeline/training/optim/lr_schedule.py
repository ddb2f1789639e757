"""The learning rate as a function of the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import OptimConfig, ScheduleConfig
from pipeline.config.time import steps_of
from pipeline.errors import UserError

ONE_CYCLE_RISE = 0.3  # share of the run, as torch.optim.lr_scheduler.OneCycleLR and fast.ai have it


def peak_lr(optim: OptimConfig, global_batch_size: int) -> float:
    """The peak for this batch: `lr` scaled linearly (Goyal et al. 2017) or by the square root (You et al. 2020)."""
    if optim.lr_batch_size is None:
        return optim.lr
    ratio = global_batch_size / optim.lr_batch_size
    return optim.lr * (math.sqrt(ratio) if optim.lr_scaling == "sqrt" else ratio)


@dataclass(frozen=True)
class _Times:
    """End of the warm-up, end of the run, and milestones, all in steps or all in epochs."""

    warmup: float
    end: float
    milestones: Sequence[float]


class Schedule:
    """Warm-up, then the configured curve; see `ScheduleConfig`.

    Args:
        config: times and shape.
        peak: learning rate after warm-up.
        steps_per_epoch: may be a fraction, as epochs need not end with a step.
    """

    def __init__(self, config: ScheduleConfig, peak: float, steps_per_epoch: float):
        self.config, self.peak, self.steps_per_epoch = config, peak, steps_per_epoch
        whole = steps_of(config.epochs, steps_per_epoch)
        #: steps of the run that this one continues; the curve is over those that follow
        self.begin = round(steps_of(config.begin, steps_per_epoch))
        length = whole - self.begin
        if self.begin and length < 1:
            raise UserError(
                f"--schedule.epochs {config.epochs}: {self.begin:,} steps are trained already, and the run would have "
                f"{round(whole):,}; give more"
            )
        #: how much longer the run is than the one that the recipe's times are for
        stretch = (
            1.0 if config.reference_epochs is None else length / steps_of(config.reference_epochs, steps_per_epoch)
        )
        steps = max(1, round(length))
        self.total_steps = self.begin + steps
        warmup = steps_of(config.warmup_epochs, steps_per_epoch) * min(1.0, stretch)
        if config.name == "one_cycle" and not warmup:
            warmup = ONE_CYCLE_RISE * length
        milestones = [steps_of(time, steps_per_epoch) * stretch for time in config.milestones]
        if config.name == "step" and config.step_every is not None:
            every = steps_of(config.step_every, steps_per_epoch) * stretch
            milestones = [every * n for n in range(1, math.ceil(steps / every))]
        self.warmup_steps = min(round(warmup), steps - 1)
        self.milestones = [math.ceil(step - 1e-6) for step in milestones]  # the first step that begins then or later
        self.steps = _Times(self.warmup_steps, steps, self.milestones)
        per_epoch = [round(step / steps_per_epoch, 6) for step in milestones]
        self.epochs = _Times(warmup / steps_per_epoch, length / steps_per_epoch, per_epoch)

    @property
    def milestone_warning(self) -> str | None:
        """A line where the rate should fall at milestones, and none is before the end: they are of a longer run."""
        if self.config.name != "multistep" or any(step < self.steps.end for step in self.milestones):
            return None
        listed = ", ".join(time if isinstance(time, str) else f"{time:g}" for time in self.config.milestones)
        return (
            f"--schedule.milestones {listed}: none is before the end of the run, so the learning rate never falls; "
            "give earlier ones, or in --schedule.reference_epochs the length that they are for"
        )

    def lr(self, step: int) -> float:
        """Learning rate of step begin <= step < total_steps."""
        if self.config.per_epoch:
            epoch = math.floor(step / self.steps_per_epoch + 1e-9) - round(self.begin / self.steps_per_epoch)
            return self._rate(max(0, epoch), self.epochs)
        return self._rate(step - self.begin, self.steps)

    @property
    def copied_until(self) -> int:
        """Until so many steps are done the weights' average is a copy of them: the warm-up, but of a continued run's,
        whose average goes on."""
        return 0 if self.begin else self.warmup_steps

    def _rate(self, now: float, times: "_Times") -> float:
        """The rate at a time, in the unit of `times`."""
        if now < times.warmup:
            shift = 1 if self.config.warmup_reaches_peak else 0
            return self.peak * self._warmup(min(1.0, (now + shift) / times.warmup))
        name, low = self.config.name, self.config.min_lr
        if name == "constant":
            return self.peak
        if name in ("step", "multistep"):
            return self.peak * self.config.gamma ** sum(now >= milestone for milestone in times.milestones)
        start = 0 if self.config.decay_from_start and name != "one_cycle" else times.warmup
        left = 1 - (now - start) / (times.end - start)
        if name in ("cosine", "one_cycle"):
            left = (1 - math.cos(math.pi * left)) / 2
        elif name == "polynomial":
            left **= self.config.power
        return low + (self.peak - low) * left

    def _warmup(self, done: float) -> float:
        """Share of the peak when this share of the warm-up is over."""
        start = self.config.warmup_start
        if self.config.warmup == "exponential":
            return start ** (1 - done)
        if self.config.name == "one_cycle":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + (1 - start) * done
