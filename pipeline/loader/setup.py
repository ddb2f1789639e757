"""What `TrainLoader` and `EvalLoader` share: their options checked, the data set opened, this process among the ranks,
and what turns a decoded batch into what a network takes."""

import dataclasses
import itertools
import numbers
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.augment.mixing import apply_erase_mix, soft_targets
from pipeline.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    RawConfig,
    ResolvedDataConfig,
    TrainConfig,
)
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.layouts.find import Alone
from pipeline.errors import UserError
from pipeline.limits import share_of_cores
from pipeline.loader.prefetch import OngoingBatches
from pipeline.loader.stream import Batch, Stream
from pipeline.model.build import Normalized
from pipeline.rank_info import RankInfo

#: options of the command line that are arguments of the loaders under another name
_ARGUMENTS = {"train.global_batch_size": "batch_size", "train.seed": "seed", "augment.policy": "augment"}


def make_config(
    data: DataConfig,
    augment: AugmentConfig,
    batch_size: int,
    seed: int = 0,
    num_classes: int | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """The checked configuration of a loader. Raises UserError for the first impossible value, named as the arguments
    of the loaders are. names: option -> argument, of this loader alone."""
    for group, settings in (("data", data), ("augment", augment)):
        for name, kind in typing.get_type_hints(type(settings)).items():
            value = getattr(settings, name)
            if not _fits(value, kind):
                raise UserError(as_argument(f"--{group}.{name} is {value!r}: give {_told(kind)}", names))
    for name, value in (("batch_size", batch_size), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{name} is {value!r}: give a whole number")
    try:
        train = TrainConfig(global_batch_size=batch_size, seed=seed)
        return RawConfig(data=data, augment=augment, train=train, model=ModelConfig(num_classes=num_classes)).resolve()
    except UserError as error:
        raise UserError(as_argument(str(error), names)) from None


#: type of a setting -> (types of what may be given, in words)
_KINDS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
    NoneType: (NoneType, "None"),
}


def _fits(value: Any, kind: Any) -> bool:
    """May a setting of this type have this value?"""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in parts
    if origin in (typing.Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple | list) and len(value) == len(parts) and all(map(_fits, value, parts))
    return kind not in _KINDS or (isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool)))


def _told(kind: Any) -> str:
    """What a setting of this type may be, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(parts)}"
    if origin in (typing.Union, UnionType):
        return " or ".join(map(_told, parts))
    return f"{len(parts)} numbers" if origin is tuple else _KINDS[kind][1]


def as_argument(message: str, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """A message about an option of the command line, about the argument of that meaning: `--augment.mixup` is mixup.
    names: option -> argument, before those that all loaders have."""

    def rename(match: re.Match[str]) -> str:
        return names.get(match[1]) or _ARGUMENTS.get(match[1], match[1].partition(".")[2])

    return re.sub(r"(?:--)?\b((?:data|augment|train|model)\.[a-z_]+)", rename, message)


def open_root(data: DataConfig, split: Alone) -> Index:
    """The index of `data.root`, built first where it is missing: by one of the processes that ask, while the others
    wait. split: "train" or "val", which alone is enough. Raises UserError where there is no data set."""
    if not data.root:
        raise UserError("root is missing: give the folder that holds train/ or val/")
    root = Path(data.root).expanduser()
    folder = Path(data.index).expanduser() if data.index else None
    return build_index(root, folder, alone=split)


def find_rank(rank: int | None, world_size: int | None, device: torch.device | str | None) -> RankInfo:
    """This process among all: as given, as torch.distributed says, or alone.

    device: None: this rank's GPU, or the CPU where none is visible. Raises UserError for a rank that is none, and where
    the environment says that there are other ranks and torch.distributed does not know them yet.
    """
    if (rank is None) != (world_size is None):
        raise UserError("rank and world_size belong together: give both, or neither")
    if rank is None or world_size is None:
        said = os.environ.get("WORLD_SIZE", "")
        if dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        elif said.isdecimal() and int(said) > 1:
            raise UserError(
                f"WORLD_SIZE is {said}, and torch.distributed is not initialized: every rank would "
                "read all images. Call torch.distributed.init_process_group first, or give rank and world_size"
            )
        else:
            rank, world_size = 0, 1
    if not 0 <= rank < world_size:
        raise UserError(f"rank is {rank}: give 0 to {world_size - 1}, as world_size is {world_size}")
    local_rank = int(os.environ.get("LOCAL_RANK") or 0) if world_size > 1 else 0
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if world_size > 1 else 1
    place = RankInfo(rank, world_size, local_rank, local_size, _device(device, local_rank, world_size))
    return dataclasses.replace(place, cores=_cores_as_bound(local_size))


def _cores_as_bound(local_size: int) -> int:
    """The cores of this rank, by those of the launcher that started it: where it has bound its ranks, each to some of
    them, they share those evenly. 0: not known."""
    if local_size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    own, all_of_node = os.sched_getaffinity(0), os.sched_getaffinity(os.getppid())
    sharing = max(1, round(local_size * len(own) / len(all_of_node)))
    return share_of_cores([own] * sharing, 0) if own < all_of_node else 0


def _device(asked: torch.device | str | None, local_rank: int, world_size: int) -> torch.device:
    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"device is {asked}: give 'cuda', 'cuda:N' or 'cpu'")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", _own_gpu(local_rank, world_size))
    return device


def _own_gpu(local_rank: int, world_size: int) -> int:
    """The number of the GPU that this process computes with."""
    if not torch.cuda.is_available():
        raise UserError("device is cuda, and no CUDA device is visible here; give 'cpu', or see nvidia-smi")
    chosen = torch.cuda.current_device()
    if world_size > 1 and chosen == 0 and local_rank < torch.cuda.device_count():
        return local_rank  # nobody has chosen: rank N of a node takes GPU N
    return chosen


class Finisher:
    """Turns a decoded batch into (images, targets) as the training step of a run computes them.

    images: float32 [B, 3, H, W] on the batch's device, augmented, normalized, erased and mixed. targets: int64 [B], or
    float32 [B, classes] where the augmentation mixes.
    """

    def __init__(self, data: ResolvedDataConfig, augment: AugmentConfig, classes: int, device: torch.device):
        self.augment, self.classes = augment, classes
        self.pixels = Normalized(torch.nn.Identity(), data.mean, data.std, channels_last=True).to(device)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        targets, c = batch.targets, self.augment
        pixels = self.pixels.normalize(batch.augmented(c))
        if batch.erase_mix is not None:
            pixels = apply_erase_mix(pixels, batch.erase_mix, c.mix_group)
            if batch.erase_mix.shares is not None:
                targets = soft_targets(targets, batch.erase_mix.shares, c.mix_group, self.classes)
        return pixels, targets


class Reader:
    """Reads ranges of batches of a stream, which is opened at the first read; one range at a time. It does not know its
    loader, so that threads and memory are free as soon as nobody has the loader any more.

    Args:
        reads_on: read beyond the end of a range, so that a range which follows it has begun already.
    """

    def __init__(self, reads_on: bool = False):
        self.stream: Stream | None = None
        self._process = 0  # that opened the stream
        self._reads_on = reads_on
        self._batches = OngoingBatches(sys.maxsize if reads_on else 0)
        self._newest: object = None  # of the ranges

    def read(self, make_stream: Callable[[], Stream], start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start..stop-1; fewer where nothing of a validation batch can be read. Raises UserError
        where another range was begun, or the loader closed, since, and in a process that can't read them.

        make_stream: opens the stream.
        """
        if start >= stop:
            return
        workers = torch.utils.data.get_worker_info()
        if workers is not None and workers.num_workers > 1:
            raise UserError(
                f"each of the {workers.num_workers} workers of a torch DataLoader would read all batches; loop over "
                "the loader itself, which reads with threads of its own, or give num_workers=0"
            )
        if self.stream is None:
            self.stream, self._process = make_stream(), os.getpid()
        self._check_process()
        self._newest = this = object()
        batches = self._batches.read(self.stream, start, stop, frozenset())
        try:
            for batch in itertools.islice(batches, stop - start):
                yield batch
                self._check_process()
                if self._newest is None:
                    raise UserError("this iterator ended when its loader was closed; begin another one")
                if self._newest is not this:
                    raise UserError(
                        "this iterator ended when another one of the same loader was begun; read one at a time, or "
                        "make a second loader"
                    )
        finally:
            if self._newest is this and not self._reads_on:
                self._batches.close()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise UserError(
                "this process was forked from one that reads with this loader, whose threads it lacks: it would wait "
                "for them; make a loader in each process"
            )

    def close(self) -> None:
        """End the threads that read and decode; the next read starts new ones."""
        self._newest = None
        self._batches.close()
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """ "batch_size is 20 in the state and 24 in this loader", for each setting that differs in two flat mappings."""
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    return [
        f"{as_argument(name)} is {saved.get(name)!r} in the state and {own.get(name)!r} in this loader"
        for name in names
    ]


def with_root(data: DataConfig | None, root: str | Path, **given: Any) -> DataConfig:
    """`data`, or the defaults, with a root, and with those of the other fields that are not None."""
    if data is not None and not isinstance(data, DataConfig):
        raise UserError(f"data is {data!r:.80}: give a pipeline.config.DataConfig")
    chosen = {name: value for name, value in given.items() if value is not None}
    if isinstance(data, ResolvedDataConfig):
        fields = {item.name: getattr(data, item.name) for item in dataclasses.fields(DataConfig)}
        data = DataConfig(**fields)
    return dataclasses.replace(data or DataConfig(), root="" if root is None else str(root), **chosen)
