"""An average of a network's weights, on the device, as a function of the steps done."""

import copy

import torch
from torch import nn

from pipeline.config import Config
from pipeline.config.time import steps_of
from pipeline.training.optim.lr_schedule import Schedule


def effective_decay(config: Config) -> float:
    """What one averaging leaves of the average: `ema.decay` for every k steps of this global batch."""
    ema = config.ema
    return ema.decay ** (ema.every_steps * config.train.global_batch_size / ema.batch_size)


def average_start(config: Config, schedule: Schedule) -> int:
    """The number of steps until which the average is a copy: `Schedule.copied_until`, or all but those of
    `ema.last_epochs`."""
    if config.ema.last_epochs is None:
        return schedule.copied_until
    return max(schedule.begin, schedule.total_steps - round(steps_of(config.ema.last_epochs, schedule.steps_per_epoch)))


class WeightAverage:
    """A second network whose parameters and buffers follow a first one's; `network` is in evaluation mode.

    Args:
        network: the first one, on its device.
        config: `ema` and `train.global_batch_size`.
        start: until so many steps are done, and an exponential average at least until the first averaging, it is a copy
            of the weights after every step. (torchvision's reference copies at every k-th of these steps alone.)
    """

    def __init__(self, network: nn.Module, config: Config, start: int):
        self.every, self.start = config.ema.every_steps, start
        self.decay = effective_decay(config) if config.ema.last_epochs is None else None  # None: the plain mean
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        own, other = self.network.state_dict().values(), network.state_dict().values()
        pairs = list(zip(own, other, strict=True))  # state_dicts share the tensors' memory
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counted = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.copy()

    @torch.no_grad()
    def copy(self) -> None:
        """Become equal to the first network."""
        for own, other in (*self.averaged, *self.counted):
            own.copy_(other)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow, if it is time: `step` steps are done."""
        if step <= (self.start if self.decay is None else max(self.start, self.every)):
            self.copy()
            return
        if step % self.every:
            return
        if self.decay is None:
            share = 1 / (step // self.every - self.start // self.every)
        else:
            share = 1 - self.decay
        own, other = (list(part) for part in zip(*self.averaged, strict=True))
        torch._foreach_lerp_(own, other, share)
        for count, seen in self.counted:
            count.copy_(seen)
