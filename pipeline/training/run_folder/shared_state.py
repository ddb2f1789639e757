"""A checkpoint is read by rank 0 alone and sent to all ranks: 512 ranks do not read the same files 512 times."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.ranks.world import World

CHUNK_BYTES = 64 << 20  # sent at once


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in the structure that is sent ahead."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def read_on_rank_zero(read: Callable[[], Any], world: World) -> Any:
    """What `read` returns on rank 0, on all ranks: dicts, lists and plain values that hold tensors on the CPU.

    Collective. Tensors go by NCCL where the ranks compute on GPUs. Raises what `read` raises, on all ranks.
    """
    if world.size == 1:
        return read()
    own: list[Any] = []

    def read_checkpoint() -> Any:
        own.append(read())
        return _map(own[0], lambda value: _Place(tuple(value.shape), value.dtype), torch.Tensor)

    structure = world.on_rank_zero(read_checkpoint)
    places: list[_Place] = []
    _map(structure, places.append, _Place)
    tensors: list[torch.Tensor] = []
    _map(own[0] if own else None, tensors.append, torch.Tensor)
    received: list[torch.Tensor] = []
    with world.watch.collective("sending the checkpoint to all ranks"):
        for first, last in _chunks(places):
            received += _send(places[first:last], tensors[first:last], world)
    if own:
        return own[0]
    following = iter(received)
    return _map(structure, lambda _: next(following), _Place)


def _map(value: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """The same structure with each leaf of type `kind` changed; always in the same order."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        made = type(value)((key, _map(item, change, kind)) for key, item in value.items())
        if hasattr(value, "_metadata"):  # of a module's state_dict: versions of its layers
            made._metadata = value._metadata  # type: ignore[attr-defined]
        return made
    if isinstance(value, list | tuple):
        return type(value)(_map(item, change, kind) for item in value)
    return value


def _chunks(places: list[_Place]) -> Iterator[tuple[int, int]]:
    """Ranges of tensors of about `CHUNK_BYTES` together, at least one each."""
    first, size = 0, 0
    for number, place in enumerate(places):
        if size and size + place.bytes > CHUNK_BYTES:
            yield first, number
            first, size = number, 0
        size += place.bytes
    if first < len(places):
        yield first, len(places)


def _send(places: list[_Place], tensors: list[torch.Tensor], world: World) -> list[torch.Tensor]:
    """Send some tensors from rank 0; what was received, on the CPU."""
    if tensors:
        flat = torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]).to(world.device)
    else:
        flat = torch.empty(sum(place.bytes for place in places), dtype=torch.uint8, device=world.device)
    dist.broadcast(flat, src=0)
    if tensors:
        return []
    parts = flat.cpu().split([place.bytes for place in places])
    return [part.clone().view(place.dtype).view(place.shape) for part, place in zip(parts, places, strict=True)]
