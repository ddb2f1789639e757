"""What `TrainLoader` and `EvalLoader` share: the data set opened, this process among the ranks, its batches read, and
made into what a network takes."""

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.augment.mixing import apply_erase_mix, soft_targets
from pipeline.config import AugmentConfig, DataConfig, ResolvedDataConfig
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.layouts.find import Alone
from pipeline.errors import UserError
from pipeline.limits import share_of_cores
from pipeline.loader.arguments import whole_number
from pipeline.loader.prefetch import OngoingBatches
from pipeline.loader.stream import Batch, Stream
from pipeline.model.build import Normalized
from pipeline.rank_env import not_a_number
from pipeline.rank_info import RankInfo


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
    if rank is not None and world_size is not None:
        rank, world_size = whole_number("rank", rank), whole_number("world_size", world_size)
        if world_size < 1:
            raise UserError(f"world_size is {world_size}: give the number of processes")
    else:
        if dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        elif _of_environment("WORLD_SIZE", 1) > 1:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and torch.distributed is not initialized: every rank would "
                "read all images. Call torch.distributed.init_process_group first, or give rank and world_size"
            )
        else:
            rank, world_size = 0, 1
    if not 0 <= rank < world_size:
        raise UserError(f"rank is {rank}: give 0 to {world_size - 1}, as world_size is {world_size}")
    local_rank = _of_environment("LOCAL_RANK", 0) if world_size > 1 else 0
    local_size = _of_environment("LOCAL_WORLD_SIZE", 1) if world_size > 1 else 1
    place = RankInfo(rank, world_size, local_rank, local_size, _device(device, local_rank, world_size))
    return dataclasses.replace(place, cores=_cores_as_bound(local_size))


def _of_environment(name: str, default: int) -> int:
    """A launcher's variable; one that is empty counts as not set. Raises UserError for what is no number."""
    wrong = not_a_number(name)
    if wrong is not None:
        raise UserError(f"{wrong}; unset it, or give rank and world_size")
    return int(os.environ.get(name) or default)


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
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"device is {asked}: give 'cuda', 'cuda:N' or 'cpu'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {asked}, and no CUDA device is visible here; give 'cpu', or see nvidia-smi")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", _own_gpu(local_rank, world_size))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"device is {asked}: the last GPU that is visible here is cuda:{torch.cuda.device_count() - 1}")
    return device


def _own_gpu(local_rank: int, world_size: int) -> int:
    """The number of the GPU that this process computes with."""
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
        with device:
            self.pixels = Normalized(torch.nn.Identity(), data.mean, data.std, channels_last=True)

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
        self._reading = threading.Lock()

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
        with self._this_thread():
            if self.stream is None:
                self.stream, self._process = make_stream(), os.getpid()
            self._check_process()
            self._newest = this = object()
            batches = self._batches.read(self.stream, start, stop, frozenset())
        try:
            for _ in range(start, stop):
                with self._this_thread():
                    batch = next(batches, None)
                if batch is None:
                    return
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

    @contextlib.contextmanager
    def _this_thread(self) -> Iterator[None]:
        """Raises UserError where another thread reads."""
        if not self._reading.acquire(blocking=False):
            raise UserError("another thread reads with this loader; read in one thread, or make a loader for each")
        try:
            yield
        finally:
            self._reading.release()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise UserError(
                "this process was forked from one that reads with this loader, whose threads it lacks: it would wait "
                "for them; make a loader in each process"
            )

    def close(self) -> None:
        """End the threads that read and decode; the next read starts new ones."""
        with self._this_thread():
            self._newest = None
            self._batches.close()
            if self.stream is not None:
                self.stream.close()
                self.stream = None
