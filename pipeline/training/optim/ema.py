"""An exponential moving average of a network's weights, on the device, as a function of the steps done."""

import copy

import torch
from torch import nn

from pipeline.config import Config


def effective_decay(config: Config) -> float:
    """What one averaging leaves of the average: `ema.decay` for every k steps of this global batch."""
    ema = config.ema
    return ema.decay ** (ema.every_steps * config.train.global_batch_size / ema.batch_size)


class WeightAverage:
    """A second network whose parameters and buffers follow a first one's; `network` is in evaluation mode.

    Args:
        network: the first one, on its device.
        config: `ema` and `train.global_batch_size`.
        warmup_steps: until so many steps are done, and at least until the first averaging, the average is a copy of the
            weights after every step. (torchvision's reference copies at every k-th of these steps alone.)
    """

    def __init__(self, network: nn.Module, config: Config, warmup_steps: int):
        self.every = config.ema.every_steps
        self.decay = effective_decay(config)
        self.copies_until = max(warmup_steps, self.every)
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
        if step <= self.copies_until:
            self.copy()
            return
        if step % self.every:
            return
        own, other = (list(part) for part in zip(*self.averaged, strict=True))
        torch._foreach_lerp_(own, other, 1 - self.decay)
        for count, seen in self.counted:
            count.copy_(seen)
