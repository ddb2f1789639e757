"""Snapshots in a node's own memory, for the case that another node is lost; see docs/clusters.md.

They are checkpoints like those on the disk, written every few seconds by one rank a node into the folder in /dev/shm
that `pipeline launch` made. When other ranks start after a loss, the newest whole one becomes a checkpoint on the disk,
and the run resumes from there as from any other.
"""

import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.files import reason_of
from pipeline.logs import logger
from pipeline.run_paths import checkpoint_name, list_checkpoints
from pipeline.tracking.ledger_rows import last_steps
from pipeline.training.ranks.launcher import current_launch
from pipeline.training.ranks.world import World
from pipeline.training.run_folder.checkpoint import write_checkpoint
from pipeline.training.run_folder.folder import RunFolder
from pipeline.training.run_folder.manifest import find_newest_good
from pipeline.training.run_folder.snapshot import HostCopy

EVERY_S = 1.0  # between two snapshots, at least
SHARE = 0.01  # of the time that they may take from training


class LocalSnapshots:
    """Writes snapshots behind the training, and keeps the newest.

    Args:
        folder: in memory.
        device: where the state lives.
        warn: called once where the GPU has no room for a copy of the state.
    """

    def __init__(self, folder: Path, device: torch.device, warn: Callable[[str], None]):
        self.folder, self.warn = folder, warn
        self._host_copy = HostCopy(device, warn)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="local snapshot")
        self._writing: Future | None = None
        self._took_s = 0.0  # from training, the last one
        self._last = time.monotonic()
        self._has_room = True

    def reserve(self, state: dict[str, dict]) -> None:
        """Take the memory for states like this one."""
        self._host_copy.reserve(state)

    def is_due(self) -> bool:
        """Is it time for one? They come the more rarely the more they cost, and never while one is being written."""
        waited = time.monotonic() - self._last
        busy = self._writing is not None and not self._writing.done()
        return self._has_room and not busy and waited >= max(EVERY_S, self._took_s / SHARE)

    def save(self, step: int, state: dict[str, dict], meta: dict) -> None:
        """Copy a state, and write it behind the training."""
        begun = time.monotonic()
        if not self._has_room or (self._writing is not None and not self._writing.done()):
            return  # this node's disk, so to say, is full, or slower than rank 0's
        copy, wait = self._host_copy.take(state)
        self._writing = self._pool.submit(self._write, step, copy, meta, wait)
        self._last = time.monotonic()
        self._took_s = self._last - begun

    def _write(self, step: int, state: dict[str, dict], meta: dict, wait: Callable[[], None]) -> None:
        wait()
        try:
            write_checkpoint(self.folder, step, state, meta)
        except OSError as error:
            self._has_room = False
            logger.warning(  # of each node
                f"no room for snapshots in {self.folder} on {socket.gethostname()} ({error.strerror}): a lost node may "
                "cost the steps since the last checkpoint"
            )
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for other, path in list_checkpoints(self.folder):
            if other != step:
                shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> tuple[int, Path] | None:
        """Step and folder of the newest whole snapshot."""
        found = find_newest_good(self.folder, lambda _: None)
        return None if found is None else (found[1]["step"], found[0])

    def close(self) -> None:
        """Let the one that is being written be finished."""
        self._pool.shutdown()


def local_snapshots(world: World, warn: Callable[[str], None]) -> LocalSnapshots | None:
    """Those of this node; None where there is no `pipeline launch` to start other ranks after a loss."""
    launch = current_launch()
    if launch is None or launch.local is None:
        return None
    return LocalSnapshots(launch.local / "snapshots", world.device, warn)


def publish_newest(world: World, local: LocalSnapshots | None, folder: RunFolder) -> None:
    """Make the newest snapshot of all nodes a checkpoint of the run folder, if it is newer than those. Collective.

    One beyond the ledger's last row is not used: that row was lost with the node of rank 0.
    """
    launch = current_launch()
    if launch is None or launch.round == 1:
        return
    found = local.newest() if local and world.local_rank == 0 else None
    steps = torch.full((world.size,), -1, dtype=torch.int64)
    steps[world.rank] = -1 if found is None else found[0]
    with world.watch.collective("the search for the newest snapshot"):
        dist.all_reduce(steps, dist.ReduceOp.MAX)
    newest, source = int(steps.max()), int(steps.argmax())

    def is_wanted() -> bool:
        on_disk = max((step for step, _ in list_checkpoints(folder.checkpoints)), default=0)
        return on_disk < newest <= last_steps(folder.ledger).get("train", 0)

    if newest < 0 or not world.on_rank_zero(is_wanted):
        return
    if world.rank == source and found is not None:
        world.watch.phase("a snapshot's way to the disk")
        temporary = folder.checkpoints / f".{checkpoint_name(newest)}.{launch.round}.tmp"
        try:
            shutil.copytree(found[1], temporary)
            temporary.rename(folder.checkpoints / checkpoint_name(newest))
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            logger.warning(  # of a node that need not be rank 0's
                f"the snapshot of step {newest} on {socket.gethostname()} could not be written to {folder.checkpoints} "
                f"({reason_of(error, folder.path)}): the run resumes from the last checkpoint there"
            )
    world.any(False)  # all wait for it
