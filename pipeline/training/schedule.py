"""The learning rate as a function of the step."""

import math

from pipeline.config import OptimConfig, ScheduleConfig


def peak_lr(optim: OptimConfig, global_batch_size: int) -> float:
    """The linear scaling rule (Goyal et al. 2017): lr * global_batch_size / lr_batch_size."""
    return optim.lr if optim.lr_batch_size is None else optim.lr * global_batch_size / optim.lr_batch_size


class Schedule:
    """Linear warm-up, then step, cosine or constant.

    Args:
        config: epochs and shape.
        peak: learning rate after warm-up.
        steps_per_epoch: may be a fraction, as epochs need not end with a step.
    """

    def __init__(self, config: ScheduleConfig, peak: float, steps_per_epoch: float):
        self.config, self.peak = config, peak
        self.total_steps = max(1, round(config.epochs * steps_per_epoch))
        self.warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), self.total_steps - 1)
        self.milestones = [round(epoch * steps_per_epoch) for epoch in config.milestones]

    def lr(self, step: int) -> float:
        """Learning rate of step 0 <= step < total_steps."""
        if step < self.warmup_steps:
            start = self.config.warmup_start
            return self.peak * (start + (1 - start) * step / self.warmup_steps)
        if self.config.name == "step":
            return self.peak * self.config.gamma ** sum(step >= milestone for milestone in self.milestones)
        if self.config.name == "cosine":
            done = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            low = self.config.min_lr
            return low + (self.peak - low) * (1 + math.cos(math.pi * done)) / 2
        return self.peak
