"""Traces a training step with fake tensors, which have shapes and no data: kernels, FLOPs, bytes.

Network, loss, autocast and autograd graph are those of a run, so nothing here depends on kinds of layers: a tensor
counts as kept for backward because autograd saves it. No GPU is needed and nothing is allocated.
"""

import collections
import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.build import Normalized, build_model
from pipeline.model.heads import frozen_norms
from pipeline.model.meta_init import meta_init
from pipeline.training.optim.loss import make_loss
from pipeline.training.step import autocast

_FLOPS = dict(flop_registry)
_aten = torch.ops.aten
for _here, _there in (
    ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward"),
):
    _FLOPS[getattr(_aten, _here)] = flop_registry[getattr(_aten, _there)]


def _convolution_backward_flops(
    grad: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, *rest: Any, out_val: Any = None
) -> int:
    """Each of the gradients of input and weight takes what the forward pass took. (torch's own count forgets that in a
    grouped convolution a filter sees its group's channels alone: 14 times too much for EfficientNet-B0.)"""
    _, _, _, _, transposed, _, _, wanted = rest
    positions = images if transposed else grad
    return 2 * positions.numel() * weight[0].numel() * sum(wanted[:2])


_FLOPS[_aten.convolution_backward] = _convolution_backward_flops

#: they write a tensor without a look at what was in it
_OVERWRITING = {_aten.copy_, _aten.fill_, _aten.zero_}
#: they move nothing: an allocation's contents are nobody's, and a new shape in place is no work for the card
_WITHOUT_KERNEL = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.as_strided_,
    _aten.set_,
    _aten.resize_,
}


def _is_kernel(func: torch._ops.OpOverload) -> bool:
    """Does this call start work on the card? `prim` calls only ask a tensor what it is (its device, its layout)."""
    returned = [value.alias_info for value in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    return func.namespace != "prim" and not is_view and func._overloadpacket not in _WITHOUT_KERNEL


@dataclass
class Layer:
    """One module. parameters: of its own, outside its children; forward FLOPs and kept bytes of the whole batch."""

    name: str
    kind: str
    parameters: int
    shape: tuple[int, ...] = ()
    flops: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Operation:
    """One kernel of a step. name: of the operator. moved: bytes read and written, each tensor once. half: computes in
    16 bits."""

    name: str
    flops: int
    moved: int
    half: bool


@dataclass
class Trace:
    """One training step over `images`: bytes kept for backward, the most alive at once (parameters aside), the
    kernels, FLOPs of the forward pass, and a row for each module that did something."""

    images: int
    kept: int = 0
    peak: int = 0
    forward_flops: int = 0
    operations: list[Operation] = field(default_factory=list)
    layers: dict[str, Layer] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    def seconds(self, half_tflops: float, tflops: float, gb_s: float) -> float:
        """The roofline: each kernel takes as long as its arithmetic or its bytes, whichever is longer.

        The kernels are those of PyTorch without a compiler: torch.compile merges some, and may fall below.
        """
        return sum(
            max(op.flops / (half_tflops if op.half else tflops) / 1e12, op.moved / gb_s / 1e9) for op in self.operations
        )


def build_fake(config: Config, num_classes: int, conv_bias: bool = False) -> Normalized:
    """The network of a run, in `meta_init`."""
    model = build_model(config.model, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if config.train.channels_last:
                weight = torch.empty_like(module.weight, memory_format=torch.channels_last)
                module.weight = nn.Parameter(weight, module.weight.requires_grad)
            if conv_bias and module.bias is None:
                module.bias = nn.Parameter(torch.empty(module.out_channels))
    network = Normalized(nn.Identity(), config.data.mean, config.data.std, config.train.channels_last)
    network.model = model  # not passed in above: fake tensors can't change their memory format in place
    network.train()
    for norm in frozen_norms(model):
        norm.eval()
    return network


class _Recorder(TorchDispatchMode):
    """Records each operation, and how many bytes are alive; `own` are the parameters' and buffers' storages."""

    def __init__(self, trace: Trace, own: set[int], stack: list[str]):
        super().__init__()
        self.trace, self.own, self.stack = trace, own, stack
        self.alive, self.forward = 0, True
        self.seen: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size

    def _record(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen and key not in self.own:
            self.seen.add(key)
            self.alive += size
            self.trace.peak = max(self.trace.peak, self.alive)
            weakref.finalize(storage, self._free, key, size).atexit = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in outputs:
            self._record(tensor)
        if not _is_kernel(func):
            return out
        read = args[1:] if func._overloadpacket in _OVERWRITING else args
        inputs = [leaf for leaf in tree_leaves((read, kwargs)) if isinstance(leaf, torch.Tensor)]
        count = _FLOPS.get(func._overloadpacket)
        flops = int(count(*args, **kwargs, out_val=out)) if count else 0
        moved = sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, *outputs])
        half = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in inputs)
        self.trace.operations.append(Operation(func._overloadpacket.__name__, flops, moved, half))
        if self.forward:
            self.trace.forward_flops += flops
            self.trace.layers[self.stack[-1]].flops += flops
        return out


class Tracer:
    """A run's network without data, to trace training steps of. Raises UserError for one that can't be built."""

    def __init__(self, config: Config, num_classes: int, conv_bias: bool = False):
        self.config, self.fake = config, FakeTensorMode()
        with meta_init(self.fake):
            self.network = build_fake(config, num_classes, conv_bias)
        self.model = self.network.model
        for parameter in self.model.parameters():  # gradients count as fixed: each goes as soon as it is there
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def trace(self, images: int) -> Trace:
        """One step: forward, loss, backward. What autograd keeps is counted once a storage, without the weights."""
        trace, stack, size = Trace(images), [""], self.config.data.image_size
        own = {t.untyped_storage()._cdata for t in [*self.network.parameters(), *self.network.buffers()]}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in kept:
                kept[storage._cdata] = storage
                trace.kept += storage.nbytes()
                trace.layers[stack[-1]].kept += storage.nbytes()
            return tensor

        with self.fake, self._naming(trace, stack), _Recorder(trace, own, stack) as recorder:
            batch = torch.empty(images, size, size, 3, dtype=torch.uint8)
            targets = torch.zeros(images, dtype=torch.int64)
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                autocast(torch.device("cpu"), self.config.train.precision),
            ):
                output = self.network(batch)
                try:
                    loss = make_loss(self.config, self.model)(output, targets)
                except DataDependentOutputException as error:
                    raise UserError(
                        f"--optim.loss {self.config.optim.loss} reads a tensor's values, and an estimate has none; "
                        "estimate with --optim.loss ce"
                    ) from error
            kept.clear()  # backward frees them as it goes
            recorder.forward = False
            loss.backward()
        return trace

    @contextlib.contextmanager
    def _naming(self, trace: Trace, stack: list[str]) -> Iterator[None]:
        """Inside, the last of `stack` is the module that runs."""
        hooks = []
        for name, module in self.network.named_modules():
            label = name.removeprefix("model").removeprefix(".")
            count = sum(p.numel() for p in module.parameters(recurse=False))
            trace.layers.setdefault(label, Layer(label, type(module).__name__, count))
            hooks.append(module.register_forward_pre_hook(lambda *_, label=label: stack.append(label)))
            hooks.append(module.register_forward_hook(lambda m, i, out: _leave(trace, stack, out)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _leave(trace: Trace, stack: list[str], out: Any) -> None:
    shapes = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
    trace.layers[stack.pop()].shape = tuple(shapes[0].shape[1:]) if shapes else ()


def by_kind(layers: dict[str, Layer]) -> list[tuple[str, int, int, int, int]]:
    """(kind, modules, parameters, forward FLOPs, kept bytes) summed by kind of module, the largest kept first."""
    sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0, 0])
    for layer in layers.values():
        for column, value in enumerate((1, layer.parameters, layer.flops, layer.kept)):
            sums[layer.kind][column] += value
    rows = [(kind, v[0], v[1], v[2], v[3]) for kind, v in sums.items() if any(v[1:])]
    return sorted(rows, key=lambda row: -row[4])
