"""Which images a network takes: tried with tensors that have a shape and no data, so that nothing is computed."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from pipeline.config import Config, ModelConfig
from pipeline.config.networks import is_torchvision
from pipeline.errors import UserError
from pipeline.model.build import AUXILIARY_WEIGHTS, auxiliary_weight, native_image_size
from pipeline.model.networks import blank_images, check_name, check_output, make_to_try


def check_image_sizes(config: Config) -> None:
    """Raises UserError, with the remedy, if the network is unknown, or can't take the run's images."""
    check_name(config.model.name)
    data, probe = config.data, SizeProbe(config.model)
    if not is_torchvision(config.model.name):
        check_output(config.model, data.val_size, config.model.num_classes or 1000)
    for size in data.sizes():
        if not probe.accepts(size, training=True):
            option = "start_size" if size == data.start_size else "image_size"
            without = probe.heads and probe.accepts(size, training=False)
            what = f"{config.model.name} with its auxiliary head" if without else config.model.name
            remedy = probe.suggest_size(size, training=True) + (", or --model.aux_weight 0" if without else "")
            raise UserError(f"--data.{option} {size}: {what} can't take such images; give {remedy}")
    check_to_score(config.model, [data.val_size], f"--data.val_size {data.val_size}", probe)


def check_to_score(config: ModelConfig, sizes: Iterable[int], option: str, probe: "SizeProbe | None" = None) -> None:
    """Raises UserError, which begins with `option`, if the network can't score images of one of these sizes."""
    probe = probe or SizeProbe(config)
    for size in sizes:
        if not probe.accepts(size, training=False):
            remedy = probe.suggest_size(size, training=False)
            raise UserError(f"{option}: {config.name} can't take images of {size} px; give {remedy}")


def check_smallest_piece(config: Config, world_size: int) -> None:
    """Raises UserError if the local batch of one of `world_size` ranks leaves BatchNorm one image, and of that one
    pixel, which has no variance."""
    local = config.train.local_batch_size(world_size)
    micro = config.train.local_micro_batch_size(world_size)
    if 1 not in (micro, local % micro):
        return
    probe = SizeProbe(config.model)
    for size in config.data.sizes():
        if not probe.trains_on_one(size):
            name = "train.micro_batch_size" if config.train.micro_batch_size else "train.global_batch_size"
            value = config.train.micro_batch_size or config.train.global_batch_size
            raise UserError(
                f"--{name} {value} leaves one image of the {local} of a rank to itself, and "
                f"{config.model.name}'s BatchNorm has nothing to average in one image of {size} px; give another"
            )


class SizeProbe:
    """Tries images on a network. It is built when it is first needed: never where only the size that it was made for is
    asked for, which it takes."""

    def __init__(self, config: ModelConfig):
        self.config, self.native_size = config, native_image_size(config)
        self.name = config.name
        self.heads = auxiliary_weight(config) > 0
        self.accepts = cache(self._accepts)
        self._network = cache(self._build)

    def _build(self, heads: bool) -> nn.Module:
        extra: dict[str, object] = (
            {"aux_logits": heads, "init_weights": False} if self.name in AUXILIARY_WEIGHTS else {}
        )
        if self.name.startswith("vit_"):
            extra["image_size"] = self.native_size
        return make_to_try(self.config, 1000, self.native_size, **extra)

    def _accepts(self, size: int, training: bool) -> bool:
        """Can it compute size x size pixels? training: with its auxiliary heads, if it has any."""
        if size == self.native_size and is_torchvision(self.name):
            return True
        network = self._network(self.heads and training).eval()
        network.training = training  # of the whole, which asks the heads then; not of BatchNorm, which averages
        try:
            with torch.no_grad():
                network(blank_images(network, 2, size))
        except (RuntimeError, ValueError, AssertionError):  # a layer with nothing left to see; a vision transformer
            return False
        return True

    def trains_on_one(self, size: int) -> bool:
        """Can a training step be computed of a single image?"""
        network = self._network(self.heads).train()
        try:
            with torch.no_grad():
                network(blank_images(network, 1, size))
        except ValueError:  # torch's word for it
            return False
        return True

    def suggest_size(self, size: int, training: bool) -> str:
        """What to give in place of a size that the network can't take: "at least 75", or "224"."""
        refused, taken = size, self.native_size
        if taken < refused or not self.accepts(taken + 32, training):
            return str(taken)
        while taken - refused > 1:
            middle = (taken + refused) // 2
            if self.accepts(middle, training):
                taken = middle
            else:
                refused = middle
        return f"at least {taken}"
