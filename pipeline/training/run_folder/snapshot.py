"""Snapshots: the state of one step copied to the host, so that training may go on while it is written.

The host's memory for it is taken once and used again at every save, its pages touched beforehand; so a save costs the
training one copy and no page faults. On CUDA that memory is pinned: the step waits only for a copy on the device, which
a stream of its own then brings to the host.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def _ready() -> None:
    """The state of a snapshot of the CPU is whole at once."""


@dataclass(frozen=True)
class Snapshot:
    """state: name -> state_dict on the CPU, whole once `wait` has returned. meta: plain values beside it."""

    step: int
    state: dict[str, Any]
    meta: dict
    wait: Callable[[], None] = _ready


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a nested state, in order."""
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _rebuilt(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same nested state with other tensors in the places of its own."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _rebuilt(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_rebuilt(item, tensors) for item in value)
    return value


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype


class HostCopy:
    """Memory on the host for one snapshot at a time.

    Args:
        device: where the state lives.
        warn: called once if the device has no room for the copy that hides the way to the host.
    """

    def __init__(self, device: torch.device, warn: Callable[[str], None]):
        self.device, self.warn = device, warn
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host: list[torch.Tensor] = []
        self.has_room = True

    def reserve(self, state: Any) -> None:
        """Take the memory for states like this one, unless it is there, and touch its pages."""
        live = list(_tensors(state))
        if [_layout(t) for t in live] != [_layout(t) for t in self.host]:
            self.host = []  # freed before more is taken
            pinned = self.stream is not None
            self.host = [_empty_like(t, pinned).zero_() for t in live]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.host)

    def take(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """The state with every tensor copied to the host, and a function that waits until the copy is whole.

        Nobody may use what the last call gave any more.
        """
        self.reserve(state)
        live = list(_tensors(state))
        copy = _rebuilt(state, iter(self.host))
        if self.stream is None:
            for there, here in zip(self.host, live, strict=True):
                _copy(there, here)
            return copy, _ready
        return copy, self._take_from_device(live)

    def _take_from_device(self, live: list[torch.Tensor]) -> Callable[[], None]:
        """Copies in the background; what the training does next to `live` comes after."""
        training = torch.cuda.current_stream(self.device)
        kept = self._clones(live)
        assert self.stream is not None
        self.stream.wait_stream(training)
        with torch.cuda.stream(self.stream), torch.no_grad():
            for there, here in zip(self.host, kept or live, strict=True):
                there.copy_(here, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        if kept is None:
            training.wait_event(done)  # the update must not overtake the copy

        def wait() -> None:
            done.synchronize()
            if kept:
                kept.clear()  # not before: the copy's stream was reading them

        return wait

    def _clones(self, live: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """Copies on the device, some hundred microseconds; None where it has no room for them."""
        if self.has_room:
            try:
                return [t.clone() for t in live]
            except torch.OutOfMemoryError:
                self.has_room = False
                self.warn(
                    "no room on the GPU for a copy of the state: each save makes a step wait for the way to the host"
                )
        return None


def _copy(there: torch.Tensor, here: torch.Tensor) -> None:
    """Copy between tensors of one layout. In one piece where there are no gaps: the C library's way past the caches
    takes a fifth of what torch's copy of the same bytes takes."""
    dense = here.is_contiguous() or (here.ndim == 4 and here.is_contiguous(memory_format=torch.channels_last))
    if dense:
        ctypes.memmove(there.data_ptr(), here.data_ptr(), here.nbytes)
    else:
        there.copy_(here)


def _empty_like(tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
    """Memory on the host with the tensor's shape, strides and type."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned)
