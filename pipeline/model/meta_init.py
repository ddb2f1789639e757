"""Networks without data, to compute shapes, sizes and memory: nothing is allocated and nothing is computed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def meta_init(fake: FakeTensorMode | None = None) -> Iterator[None]:
    """Parameters and buffers that modules register in this context have a shape and a dtype, and no data.

    fake: they are its fake tensors, on the device where they were created; default: they are on the meta device. Other
    tensors are real: some networks compute while they are built (RegNet its widths).
    """

    def to_meta(tensor: torch.Tensor) -> torch.Tensor:
        if _has_no_data(tensor):
            return tensor
        return tensor.to("meta") if fake is None else fake.from_tensor(tensor)

    def take_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not _has_no_data(parameter):
            parameter = nn.Parameter(to_meta(parameter.detach()), parameter.requires_grad)
        registered[0](module, name, parameter)

    def take_buffer(module: nn.Module, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        registered[1](module, name, None if tensor is None else to_meta(tensor), persistent)

    registered = nn.Module.register_parameter, nn.Module.register_buffer
    setattr(nn.Module, "register_parameter", take_parameter)  # noqa: B010 - a method is replaced
    setattr(nn.Module, "register_buffer", take_buffer)  # noqa: B010
    try:
        with _MetaDraws():
            yield
    finally:
        setattr(nn.Module, "register_parameter", registered[0])  # noqa: B010
        setattr(nn.Module, "register_buffer", registered[1])  # noqa: B010


def _has_no_data(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class _MetaDraws(TorchDispatchMode):
    """Initializers that resample until all values fit read values that do not exist: they read 0, which is "done"."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_data(args[0]):
            return 0
        return func(*args, **(kwargs or {}))
