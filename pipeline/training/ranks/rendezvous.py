"""How ranks find each other: by the launcher's store; or, where no launcher watches over them, by rank 0's, with
patience that can be seen and interrupted."""

import os
import socket
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from pipeline.errors import TransientError
from pipeline.logs import logger
from pipeline.progress import duration
from pipeline.training.ranks.launcher import current_launch
from pipeline.training.ranks.stop_request import StopRequest

SAY_EVERY_S = 30.0
_POLL_S = 0.1
_store: dist.Store | None = None  # this process's first; kept, as rank 0 may host it for all
_name = ""  # of the newest start, the same on all ranks


def find_store(rank: int, size: int, timeout: timedelta, limit_s: float, stop: StopRequest | None) -> dist.Store:
    """The store by which all ranks of this start meet. timeout: of what asks it; limit_s, stop: as of `meet_at_store`.

    A process may start several times, one after the other: `pipeline.train` and then `pipeline.evaluate`. It keeps its
    first store, and each further start has keys of its own there; torch would find those of the one before.
    """
    global _store
    if _store is not None:
        return dist.PrefixStore(f"after/{_name}", _store)
    if "TORCHELASTIC_RUN_ID" in os.environ or current_launch() is not None:
        _store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    else:
        _store = meet_at_store(rank, size, limit_s, stop)
    return _store


def agree_on_name() -> str:
    """A name of this start that all ranks know. Collective.

    Nothing in the environment is common to all ranks of a start and to no other: under torchrun old and new nodes count
    restarts apart, and the store may outlive a start. So rank 0 names it.
    """
    global _name
    name: list[str] = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    _name = name[0]
    return _name


def meet_at_store(rank: int, size: int, limit_s: float, stop: StopRequest | None) -> dist.Store:
    """The store of all ranks at MASTER_ADDR:MASTER_PORT, which rank 0 hosts; returns when all are there.

    Says whom it waits for. Raises KeyboardInterrupt when the process is asked to stop, TransientError after `limit_s`
    seconds. torch's own rendezvous does neither of the three.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    begun = said = time.monotonic()

    def pause(whom: str) -> None:
        nonlocal said
        if stop:
            raise KeyboardInterrupt
        now = time.monotonic()
        if now - begun > limit_s:
            raise TransientError(
                f"rank {rank} of {size} waited {duration(limit_s)} at {host}:{port} for {whom}; are RANK and "
                "WORLD_SIZE left over from another job? Unset them, or start all ranks with torchrun"
            )
        if now - said > SAY_EVERY_S or (said == begun and now - begun > 3):
            said = now
            logger.info(f"rank {rank} of {size}: waiting at {host}:{port} for {whom}")
        time.sleep(_POLL_S)

    if rank:
        while not _answers(host, port):
            pause("rank 0")
    try:
        store = dist.TCPStore(
            host, port, size, is_master=rank == 0, timeout=timedelta(seconds=60), wait_for_workers=False
        )
    except (dist.DistError, RuntimeError) as error:
        raise TransientError(
            f"rank {rank} of {size} can't open {host}:{port} ({str(error).splitlines()[0][:150]}); "
            "if the port is taken, give another with --rdzv-endpoint or --master-port"
        ) from error
    store.set(f"arrived/{rank}", "1")
    while True:
        missing = [other for other in range(size) if not store.check([f"arrived/{other}"])]
        if not missing:
            return dist.PrefixStore("ranks", store)
        pause("rank " + ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else ""))


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False
