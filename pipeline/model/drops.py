"""Dropout and stochastic depth that follow from the sample's position in the global batch, by hooks.

The mask is a hash of the position's key (a function of seed, step and position), the layer's number and the element.
It depends neither on a generator's state nor on the number of ranks. Without keys torch's generator is used.
"""

import math
from typing import Any

import torch
from torch import nn
from torchvision.models.maxvit import PartitionAttentionLayer
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2
from torchvision.ops import StochasticDepth, stochastic_depth

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


class DropKeys:
    """State that the drops of a network share.

    Attributes:
        network: drops are active while it is in training mode, whatever mode the layers are in (frozen ones are in
            evaluation mode, and BatchNorm alone in training mode when its statistics are recomputed).
    """

    def __init__(self) -> None:
        self.network: nn.Module | None = None
        self._keys: torch.Tensor | None = None
        self._rows: list[tuple[int, float]] = []  # (number, share) of each drop of whole samples
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._factors: dict[tuple[torch.dtype, int], tuple[torch.Tensor, ...]] = {}

    @property
    def keys(self) -> torch.Tensor | None:
        """int64 [B], 0 to 2^32 - 1, one for each sample of the batch; None: there are none."""
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._keys, self._factors = keys, {}

    def drops(self) -> bool:
        return self.network is not None and self.network.training

    def add_rows(self, number: int, share: float) -> int:
        """Register a drop of whole samples. Returns its place among them."""
        self._rows.append((number, share))
        return len(self._rows) - 1

    def row_factor(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """What multiplies x ([B, ...]) in a drop of whole samples: [B, 1, ...] of its dtype, 0 or 1 / (1 - share).

        All layers' factors are drawn together: a draw is some 30 small operations, and a deep network has 50 layers.
        """
        keys, wanted = self._keys, (x.dtype, x.ndim)
        assert keys is not None and len(keys) == len(x), "one key for each sample"
        if wanted not in self._factors:
            numbers, shares = self._on(keys.device)
            draws = (_mix(_mix(keys ^ numbers)) >> 8) * 2.0**-24  # `keyed_uniform`, whose first counter is 0
            kept = draws >= shares.float()
            exact = torch.promote_types(x.dtype, torch.float32)
            factors = (kept.to(exact) / (1 - shares).to(exact)).to(x.dtype)
            self._factors[wanted] = factors.view(*factors.shape, *[1] * (x.ndim - 1)).unbind()
        return self._factors[wanted][place]

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """([layers, 1] int64: the layers' keys; [layers, 1] float64: their shares), on the device."""
        if device not in self._constants:
            numbers = torch.tensor([[_layer_constant(number)] for number, _ in self._rows], device=device)
            shares = torch.tensor([[share] for _, share in self._rows], dtype=torch.float64, device=device)
            self._constants[device] = numbers, shares
        return self._constants[device]


def _layer_constant(number: int) -> int:
    return (number + 1) * _GOLDEN & _MASK


def _times(x: torch.Tensor, factor: int) -> torch.Tensor:
    """x * factor modulo 2^32, in halves: no int64 overflows on the way."""
    return ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & _MASK


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers (in int64) that mixes every bit: Wellons' "lowbias32" (2018)."""
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def keyed_uniform(keys: torch.Tensor, number: int, count: int) -> torch.Tensor:
    """float32 [B, count] in [0, 1): `count` draws for each key (int64 [B]), other ones for each `number`."""
    own = _mix(keys ^ _layer_constant(number))
    counters = torch.arange(count, device=keys.device)
    return (_mix(own[:, None] ^ _times(counters, _GOLDEN)) >> 8) * 2.0**-24


class _KeyedDrop:
    """Sets this share of the values to 0, or with `rows` of the samples, and scales up the rest."""

    def __init__(self, share: float, rows: bool):
        self.share, self.rows, self.place = share, rows, 0
        self.tie(DropKeys(), 0)

    def tie(self, drop_keys: DropKeys, number: int) -> None:
        """Follow these keys, as number so-and-so of the network's drops."""
        self.drop_keys, self.number = drop_keys, number
        if self.rows:
            self.place = drop_keys.add_rows(number, self.share)

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, ...]."""
        if self.drop_keys.keys is None:
            return stochastic_depth(x, self.share, "row") if self.rows else nn.functional.dropout(x, self.share)
        if self.rows:
            return x * self.drop_keys.row_factor(self.place, x)
        kept = keyed_uniform(self.drop_keys.keys, self.number, math.prod(x.shape[1:])) >= self.share
        return x * (kept.to(x.dtype) / (1 - self.share)).view(x.shape)


class Drop(_KeyedDrop):
    """A forward hook: drops values of a layer's output in training."""

    def __call__(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return self.drop(output) if self.drop_keys.drops() else output


class DropInput(_KeyedDrop):
    """A forward pre-hook: drops values of a layer's first input in training."""

    def __call__(self, module: nn.Module, inputs: tuple) -> tuple:
        return (self.drop(inputs[0]), *inputs[1:]) if self.drop_keys.drops() else inputs


#: block -> its StochasticDepth, and the ends of the two branches that both go through it
_SHARED = {
    SwinTransformerBlock: ("stochastic_depth", ("attn", "mlp")),
    SwinTransformerBlockV2: ("stochastic_depth", ("norm1", "norm2")),
    PartitionAttentionLayer: ("stochastic_dropout", ("attn_layer", "mlp_layer")),
}


def tie_drops(model: nn.Module) -> DropKeys | None:
    """Replace the model's own dropout and stochastic depth layers by hooks, number all drops from the input on, and
    give them one `DropKeys`. None: nothing is ever dropped."""
    block: Any
    module: Any
    for block in model.modules():
        name, ends = _SHARED.get(type(block), ("", ()))
        if ends and getattr(block, name).p > 0:  # each branch has its own draws
            for end in ends:
                getattr(block, end).register_forward_hook(Drop(getattr(block, name).p, rows=True))
            getattr(block, name).p = 0.0
    for module in model.modules():
        share = getattr(module, "drop_prob", 0.0) if type(module).__name__ == "DropPath" else 0.0  # timm's
        if isinstance(share, float) and share > 0:
            module.register_forward_hook(Drop(share, rows=True))
            setattr(module, "drop_prob", 0.0)  # noqa: B010 - no type declares it
        if isinstance(module, nn.Dropout | StochasticDepth) and module.p > 0:
            module.register_forward_hook(Drop(module.p, isinstance(module, StochasticDepth)))
            module.p = 0.0
    drop_keys, number = DropKeys(), 0
    drop_keys.network = model
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, _KeyedDrop):
                hook.tie(drop_keys, number)
                number += 1
    return drop_keys if number else None
