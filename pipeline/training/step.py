"""One optimizer step: forward and backward over the local batch, gradients averaged over ranks, update."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.augment.apply import EraseAndMix, deliver
from pipeline.augment.mixing import apply_erase_mix, neutral_erase_mix, soft_targets
from pipeline.config import Config, TrainConfig
from pipeline.loader.stream import Batch
from pipeline.model.build import Normalized
from pipeline.model.heads import frozen_norms, in_heads
from pipeline.model.weights import load_whole
from pipeline.rng import hash_counter
from pipeline.training.optim.clipping import adaptive_gradient_clip, clip_norm
from pipeline.training.optim.ema import WeightAverage
from pipeline.training.optim.loss import make_loss
from pipeline.training.optim.optimizer import OPTIMIZERS, heads_for, make_optimizer
from pipeline.training.ranks.stragglers import OwnTime
from pipeline.training.ranks.world import World

#: torch 2.13 renamed DistributedDataParallel's switch for sending rank 0's buffers around at every step
_PARAMETERS = inspect.signature(DistributedDataParallel).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _PARAMETERS else "broadcast_buffers"
_DROPS = 0xD809  # the random-number stream for dropout and stochastic depth
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The autocast context of a precision; fp32 has none."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def exchange_gradients(network: nn.Module, train: TrainConfig, device: torch.device) -> DistributedDataParallel:
    """The network whose backward averages gradients over all ranks, bucket by bucket as it runs. (A rank alone
    has nothing to average, and is spared the copies into buckets.)"""
    sync: dict[str, Any] = {_SYNC_BUFFERS: False}
    exchanging = DistributedDataParallel(
        network,
        device_ids=[device.index] if device.type == "cuda" else None,
        **sync,
        bucket_cap_mb=train.bucket_mb,
        gradient_as_bucket_view=True,
        static_graph=True,
    )
    if train.compress_gradients == "bf16":
        exchanging.register_comm_hook(None, bf16_compress_hook)
    return exchanging


def compiled(module: nn.Module, sizes: list[int], mode: str | None = None) -> Callable[..., Any]:
    """The module compiled, once for each size of image that is to come. (Left to itself torch.compile would make the
    second one's code for any size, which is slower, and give up after eight.)"""
    if len(sizes) == 1:
        return torch.compile(module, mode=mode)
    limit = 4 + 2 * len(sizes)  # a last micro batch may be smaller
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    return torch.compile(module, dynamic=False, mode=mode)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step: what a layer draws from them follows from (seed, step, rank), not from
    history. (Drop-out and stochastic depth do not even depend on the rank: `model.drops`.)"""
    torch.manual_seed(int(hash_counter(seed, 0x5EED, step, rank)) >> 1)


def lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's state the memory format of its parameters: a checkpoint may be from a run with another
    `train.channels_last`, and fused kernels go through both in the order of memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class NormalizeEraseMix(Normalized):
    """`Normalized`, which also erases and mixes when given `EraseAndMix`. keys: int64 [B], for `model.drops`."""

    def __init__(self, model: nn.Module, mean: tuple, std: tuple, channels_last: bool, group: int):
        super().__init__(model, mean, std, channels_last)
        self.group = group

    def forward(
        self, images: torch.Tensor, how: EraseAndMix | None = None, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        if keys is not None:
            drop_keys: Any = self.model.drop_keys
            drop_keys.keys = keys
        pixels = self.normalize(images)
        return self.model(pixels if how is None else apply_erase_mix(pixels, how, self.group))


class TrainStep:
    """Model, optimizer and scaler of one rank, and the step that changes them.

    `model` is the bare torchvision module, whose state_dict is what checkpoints hold; BatchNorm's running statistics
    are rank 0's (Goyal et al. 2017: statistics per worker), sent to the others when somebody needs them.
    """

    def __init__(self, model: nn.Module, config: Config, world: World, average_start: int = 0):
        self.config, self.device, self.rank = config, world.device, world.rank
        self.micro = config.train.local_micro_batch_size(world.size)
        self.model = model
        data, group = config.data, config.augment.mix_group
        whole = NormalizeEraseMix(model, data.mean, data.std, config.train.channels_last, group).to(self.device)
        self.network = whole  # for evaluation: no gradients to exchange
        self.exchanging = exchange_gradients(whole, config.train, self.device) if world.size > 1 else whole
        self.own_time = OwnTime(self.device)
        self.ema = WeightAverage(whole, config, average_start) if config.ema.averages else None  # of rank 0's weights
        self.graphs = config.train.cuda_graphs and self.device.type == "cuda"
        self.forward: Callable[..., Any] = self.exchanging
        if config.train.compile:
            self.forward = compiled(self.exchanging, data.sizes(), "reduce-overhead" if self.graphs else None)
        kinds = {buffer.dtype for buffer in self.model.buffers()}
        self.buffers = [[b for b in self.model.buffers() if b.dtype == kind] for kind in sorted(kinds, key=str)]
        self.loss = make_loss(config, self.model).to(self.device)
        heads = heads_for(config)
        self.optimizer = make_optimizer(self.model, config.optim, heads)
        self.skips_by_itself = config.optim.name in OPTIMIZERS  # an update that is not finite; see `_update`
        #: the parameters that adaptive clipping is for
        self.body = [p for name, p in self.model.named_parameters() if p.requires_grad and not in_heads(name, heads)]
        self.held = frozen_norms(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.train.precision == "fp16")

    def __call__(self, batch: Batch, lr: float, step: int = 0) -> torch.Tensor:
        """Train on a local batch, in step number `step`. Returns float32 [4]: the mean loss over it, how many first
        guesses were right, the norm of the averaged gradient before it is clipped, and fp16's loss scale (else 1), on
        the device and not yet read: nothing here waits for it."""
        self.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.zero_grad(set_to_none=True)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the last replay gave is no longer needed
        before = self._flat_buffers()
        total, hits = torch.zeros((2,), device=self.device)
        pieces = self._pieces(batch, step)
        for number, (images, targets, erase_mix, keys) in enumerate(pieces, 1):
            last = number == len(pieces)
            with self._exchange_if(last):
                with autocast(self.device, self.config.train.precision):
                    with self.own_time.measure():
                        output = self.forward(images, erase_mix, keys)
                    logits = output[0] if isinstance(output, tuple) else output
                    if erase_mix is not None and erase_mix.shares is not None:
                        targets = soft_targets(
                            targets, erase_mix.shares, self.config.augment.mix_group, logits.shape[1]
                        )
                    loss = self.loss(output, targets) * (len(images) / len(batch))
                self.scaler.scale(loss).backward()
            total += loss.detach()
            labels = targets.argmax(1) if targets.is_floating_point() else targets
            hits += (logits.detach().argmax(1) == labels).sum()
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self.config.optim.agc is not None:
            adaptive_gradient_clip([p for p in self.body if p.grad is not None], self.config.optim.agc)
        if self.config.optim.clip_norm is not None:
            clip_norm(trained, self.config.optim.clip_norm)
        self._update(norm, before)
        return torch.stack([total, hits, norm, self.scaler.scale(torch.ones_like(norm))])

    def _exchange_if(self, last: bool) -> AbstractContextManager:
        """Gradients are exchanged in the backward of a step's last micro batch alone."""
        if last or not isinstance(self.exchanging, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.exchanging.no_sync()

    def _pieces(
        self, batch: Batch, step: int
    ) -> list[tuple[torch.Tensor, torch.Tensor, EraseAndMix | None, torch.Tensor | None]]:
        """(images, labels, erasing and mixing, keys of what is dropped) of each part that goes through the network at
        once. Colors and geometry are changed here: as bytes, before anything is compiled, as each op is for other
        images at every step."""
        images = batch.augmented(self.config.augment).split(self.micro)
        targets = batch.targets.split(self.micro)
        none: Sequence[None] = [None] * len(images)
        erase_mix = none if batch.erase_mix is None else batch.erase_mix.split(self.micro)
        drop_keys = self._drop_keys(step, len(batch))
        keys = none if drop_keys is None else drop_keys.split(self.micro)
        return list(zip(images, targets, erase_mix, keys, strict=True))

    def _drop_keys(self, step: int, count: int) -> torch.Tensor | None:
        """int64 [count] on the device: a hash of seed, step and the places of the local batch in the global one; None
        for a network that drops nothing."""
        if getattr(self.model, "drop_keys", None) is None:
            return None
        places = np.arange(self.rank * count, (self.rank + 1) * count)
        hashed = hash_counter(self.config.train.seed, _DROPS, step, places) >> np.uint64(32)
        return deliver(hashed.astype(np.int64), self.device)

    def _update(self, norm: torch.Tensor, before: list[torch.Tensor]) -> None:
        """Change the weights, unless the gradient's norm is NaN or infinite: then they, the optimizer's state and
        BatchNorm's statistics stay as they were. Decided on the device, without a synchronization; all ranks
        decide the same, as they have the same averaged gradient. (For an optimizer
        of the user's own the host decides.)"""
        good = norm.isfinite()
        if self.skips_by_itself:  # ours look at it on the device
            self.optimizer.found_inf = good.logical_not().float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif good.item():  # one of the user's own: the host has to know, and waits
            self.optimizer.step()
        self.scaler.update()
        for buffers, flat, kept in zip(self.buffers, self._flat_buffers(), before, strict=True):
            mended = torch.where(good, flat, kept).split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(mended, buffers, strict=True)])

    def average(self, step: int) -> None:
        """Let the weights' average follow, where there is one: `step` steps are done."""
        if self.ema is not None:
            self.ema.update(step)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What there is to score: "raw", the network as it is trained, and "ema", its average, if there is one."""
        return {"raw": self.network} | ({} if self.ema is None else {"ema": self.ema.network})

    def _flat_buffers(self) -> list[torch.Tensor]:
        """A copy of BatchNorm's statistics, one vector for each type."""
        return [torch.cat([buffer.reshape(-1) for buffer in buffers]) for buffers in self.buffers]

    def train(self) -> None:
        """Training mode; frozen normalization layers keep their statistics."""
        self.exchanging.train()
        for norm in self.held:
            norm.eval()

    def warm_up(self, size: int | None = None) -> None:
        """Forward and backward on a blank batch that leave no trace. size: of its images; default: the largest.

        DistributedDataParallel lays its gradient buckets out again after its first backward, and with more than two
        ranks the order of a sum follows from the layout. Done before the first step of every start, this makes a step's
        bits independent of where the run was resumed.
        """
        size = size or self.config.data.image_size
        kept = [buffer.clone() for buffer in self.model.buffers()]
        # On a GPU what is tuned and compiled is made for its size, and memory that is short is found here.
        whole = self.device.type == "cuda" or self.config.train.compile
        count = self.micro if whole else min(self.micro, 2)
        count += -count % self.config.augment.mix_group
        images = torch.zeros(count, size, size, 3, dtype=torch.uint8, device=self.device)
        targets = torch.zeros(count, dtype=torch.int64, device=self.device)
        erase_mix = neutral_erase_mix(self.config.augment, count, self.device)
        self.train()
        for _ in range(2):
            with autocast(self.device, self.config.train.precision):
                loss = self.loss(self.forward(images, erase_mix, self._drop_keys(0, count)), targets)
            self.scaler.scale(loss).backward()
            self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(before)

    def state_dict(self) -> dict[str, dict]:
        """{"model": ..., "optimizer": ...}: plain state_dicts of tensors and numbers; the scaler is in the second. And
        "ema", a state_dict as the first, if there is an average."""
        optimizer = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        average = {} if self.ema is None else {"ema": self.ema.network.get_submodule("model").state_dict()}
        return {"model": self.model.state_dict(), "optimizer": optimizer, **average}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        load_whole(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"]["optimizer"])
        lay_out_as_parameters(self.optimizer)
        if self.skips_by_itself and "fused" in self.optimizer.defaults:
            for group in self.optimizer.param_groups:
                group["fused"] = True  # also from a checkpoint of an optimizer that was not
        self.scaler.load_state_dict(state["optimizer"]["scaler"])
        if self.ema is not None and "ema" in state:
            load_whole(self.ema.network.get_submodule("model"), state["ema"])
        elif self.ema is not None:  # a checkpoint of imported weights
            self.ema.copy()
