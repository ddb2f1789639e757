"""The marker `gpu_fault` in the run folder: which node's GPU failed, so that nobody tries it again. Without torch.

The rank that meets the fault writes it. Under torchrun the ranks that are started again in the same place refuse; the
batch scripts exclude the node and requeue the job; the next start enters the fault into the ledger and removes it.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path

from pipeline.errors import GpuFault
from pipeline.files import atomic_write

NAME = "gpu_fault"
EXCLUDED = "excluded"  # a second line, by the batch script: Slurm gives the job that node no more


def _attempt() -> str | None:
    """The Slurm job's id and restart count, as the batch scripts write it."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else None


def _node() -> str:
    """This machine, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _launch() -> list[str | None]:
    """What all starts of ranks by the same launcher have in common. Not by it alone: torchrun's run id is "none" where
    nobody gives one."""
    return [os.environ.get("TORCHELASTIC_RUN_ID"), _attempt(), os.environ.get("PIPELINE_LAUNCH_JOB")]


def _launcher_start() -> float:
    """When torchrun was started on this machine, in seconds since the epoch; 0 where that can't be found out.

    It is the nearest ancestor that has no rank's variables: between it and a rank there may be a script.
    """
    try:
        pid = os.getppid()
        while b"TORCHELASTIC_RUN_ID=" in Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(_stat(pid)[1])
        ticks = int(_stat(pid)[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # of another user; no Linux
        return 0.0


def _stat(pid: int) -> list[str]:
    """The fields of a process from the third on (proc(5), stat)."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def record_gpu_fault(folder: Path, rank: int, step: int | None, message: str) -> None:
    """Write the marker, if the folder can be written."""
    facts = {
        "node": _node(),
        "rank": rank,
        "step": step,
        "message": message,
        "attempt": _attempt(),
        "launch": _launch(),
        "time": time.time(),
    }
    with contextlib.suppress(OSError):
        if folder.is_dir():
            atomic_write(folder / NAME, json.dumps(facts) + "\n")


def _read(folder: Path) -> dict | None:
    try:
        first, *more = (folder / NAME).read_text(encoding="utf-8").splitlines()
        return {**json.loads(first), EXCLUDED: EXCLUDED in more}
    except (OSError, ValueError):
        return None


def refuse_restart_in_place(folder: Path) -> None:
    """Raises GpuFault where ranks are started again after a GPU fault, and would have the same GPU: under torchrun all
    of them, under `pipeline launch` those of that node, which it then leaves out."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    fault = _read(folder)
    if fault is None or fault.get("launch") != _launch():
        return
    by_torchrun = "PIPELINE_LAUNCH_ROUND" not in os.environ
    if by_torchrun and fault["time"] < _launcher_start():
        return  # of a launch before
    if by_torchrun or fault.get("node") == _node():
        error = GpuFault(f"not started again on {fault['node']}, where {fault['message']}")
        error.on_all_ranks = True
        raise error


def take_gpu_fault(folder: Path) -> dict | None:
    """What the marker says, as facts for the ledger, and remove it; None: there is none."""
    fault = _read(folder)
    if fault is None:
        return None
    (folder / NAME).unlink(missing_ok=True)
    names = {"node": "fault_node", "rank": "fault_rank", "step": "fault_step", "time": "fault_time"}
    return {names.get(key, key): fault.get(key) for key in (*names, "message", EXCLUDED)}
