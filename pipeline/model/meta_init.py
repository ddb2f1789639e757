"""Networks without data, to ask about shapes, sizes and memory: nothing is allocated and nothing computed."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def meta_init(fake: FakeTensorMode | None = None) -> Iterator[None]:
    """What parameters and buffers modules take on in this context have a shape, a dtype and no data.

    fake: they are its fake tensors, on the device where they were made; default: they are on the meta device. Only they
    are: what a network computes while it is built, as RegNet computes its widths with tensors, has to be computed.
    """

    def blank(tensor: torch.Tensor) -> torch.Tensor:
        if _has_no_data(tensor):
            return tensor
        return tensor.to("meta") if fake is None else fake.from_tensor(tensor)

    def take_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not _has_no_data(parameter):
            parameter = nn.Parameter(blank(parameter.detach()), parameter.requires_grad)
        registered[0](module, name, parameter)

    def take_buffer(module: nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        registered[1](module, name, None if tensor is None else blank(tensor), persistent)

    registered = nn.Module.register_parameter, nn.Module.register_buffer
    nn.Module.register_parameter, nn.Module.register_buffer = take_parameter, take_buffer
    try:
        with _MetaDraws():
            yield
    finally:
        nn.Module.register_parameter, nn.Module.register_buffer = registered


def _has_no_data(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class _MetaDraws(TorchDispatchMode):
    """Initialisers that draw until all values fit ask about values, of which there are none: they are told 'done'."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_data(args[0]):
            return 0
        return func(*args, **(kwargs or {}))
