"""How ranks that no launcher watches over find each other: with patience that can be seen and interrupted."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from pipeline.errors import TransientError
from pipeline.progress import duration
from pipeline.training.ranks.stop_request import StopRequest

SAY_EVERY_S = 30.0
_POLL_S = 0.1


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
            print(f"rank {rank} of {size}: waiting at {host}:{port} for {whom}", flush=True)
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
