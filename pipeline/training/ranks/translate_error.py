"""What broke underneath, in one line with its remedy: memory, other ranks, file handles, ports, disks."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import Config
from pipeline.counts import count
from pipeline.errors import GpuFault, TransientError, UserError
from pipeline.files import FREE, why_full
from pipeline.gpu_facts import GPU_FAULT, is_gpu_fault, query_gpus, visible_gpus
from pipeline.limits import available_memory
from pipeline.redact import redact
from pipeline.run_paths import RunPaths
from pipeline.training.ranks.launcher import without_launcher
from pipeline.training.ranks.world import World
from pipeline.training.run_folder.gpu_fault import record_gpu_fault

MIB = 1 << 20
SMALL_SHM = 256 * MIB  # NCCL takes about 10 MiB for each pair of GPUs
_ESTIMATE_LIMIT_S, _LIMIT_S = 120.0, 300.0
_HOST_MEMORY = re.compile(r"DefaultCPUAllocator: .*?(\d+) bytes")
_NO_THREAD = "can't start new thread"  # no room for its stack, mostly
_NO_CONTEXT = "CUDA error: out of memory"  # of CUDA, not of torch's allocator
_GPU_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)")
_NOT_DETERMINISTIC = "does not have a deterministic implementation"
_SAME_GPU = re.compile(r"Duplicate GPU detected|Multiple Ranks are using the same GPU")  # NCCL up to 2.28, and later
_NO_ROOM_FOR_NCCL = re.compile(
    r"Cuda failure (\d+ )?'out of memory'|CUDA error 2 'out of memory'|Failed to CUDA [cm]alloc"
)
_CONTACT_LOST = re.compile(
    r"gloo|NCCL|Connection (reset|closed)|Broken pipe|Socket Timeout|connectFullMesh|c10d", re.IGNORECASE
)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENOENT}


@contextlib.contextmanager
def recording_gpu_faults(config: Config, world: World) -> Iterator[None]:
    """Writes the marker of a GPU's fault as soon as it is raised inside: before loaders, ledger and W&B are closed,
    which may take long, and the launcher may end this process any time."""
    try:
        yield
    except RuntimeError as error:
        _record_if_gpu_fault(error, config, world)
        raise


def _record_if_gpu_fault(error: BaseException, config: Config, world: World) -> None:
    if is_gpu_fault(error) and config.run_dir:
        folder = Path(config.run_dir).expanduser()
        record_gpu_fault(folder, world.rank, world.watch.step, redact(_fault_line(error)))


@contextlib.contextmanager
def translating_errors(config: Config, world: World) -> Iterator[None]:
    """Turns an error raised inside into a TransientError that names it, and informs the other ranks."""
    try:
        yield
    except UserError:
        raise
    except TransientError as error:
        if not error.on_all_ranks:
            world.watch.announce_exit(str(error))
        raise
    except (RuntimeError, OSError, MemoryError) as error:
        world.watch.phase("the end of a rank that broke", limit_s=_LIMIT_S)
        if _NOT_DETERMINISTIC in str(error):
            raise UserError(
                f"--train.deterministic: {first_line(error).partition(_NOT_DETERMINISTIC)[0].strip()}, which "
                f"{config.model.name} calls, has no deterministic form on CUDA; give --train.deterministic false, or "
                "another network"
            ) from error
        if _SAME_GPU.search(str(error)):
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            raise UserError(
                "several ranks of a node compute on the same GPU, and NCCL requires one for each; start as many "
                "processes a node as it has GPUs"
                + (f" (CUDA_VISIBLE_DEVICES={visible} on {socket.gethostname()})" if visible else "")
            ) from error
        _record_if_gpu_fault(error, config, world)
        first = False
        message = translate_error(error, config, world)
        if message is None or not _lost_contact(error):
            first = world.watch.announce_exit(message or f"{type(error).__name__}: {first_line(error)}")
        if message is None:
            raise
        if first and _out_of_memory(error):
            message += largest_fitting_batch(config, _room_mib(world))
        world.watch.dump()
        if is_gpu_fault(error):
            if config.run_dir:
                folder = Path(config.run_dir).expanduser()
                record_gpu_fault(folder, world.rank, world.watch.step, redact(message))
            raise GpuFault(message) from error
        raise TransientError(
            message, on_all_ranks=_lost_contact(error) and world.rank != world.watch.reporter()
        ) from error


def translate_error(error: BaseException, config: Config, world: World) -> str | None:
    """One line on what broke; None where it is not known."""
    number = getattr(error, "errno", None)
    text = str(error)
    if is_gpu_fault(error):
        when = "before the first step" if world.watch.step is None else f"step {world.watch.step}"
        gpu = name_gpu(world)
        return (
            f"GPU fault on {world.watch.names[world.rank]}{gpu}, {when}: {_fault_line(error)}; see nvidia-smi -q -d "
            "ECC and dmesg (NVRM: Xid)"
        )
    if _out_of_memory(error):
        return _memory(error, world)
    if _NO_CONTEXT in text:
        return (
            f"out of GPU memory on {world.watch.names[world.rank]}{name_gpu(world)}: none is left for CUDA "
            "itself; does another process use this GPU? See nvidia-smi"
        )
    if _NO_ROOM_FOR_NCCL.search(text):
        return (
            f"out of GPU memory on {world.watch.names[world.rank]}{name_gpu(world)}: none is left for NCCL; lower "
            "--train.micro_batch_size, or does another process use this GPU? See nvidia-smi"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return (
            f"too few file handles: this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files; "
            "raise that with `ulimit -n 65536` before the start"
        )
    if number == errno.EADDRINUSE or "EADDRINUSE" in text:
        port = os.environ.get("MASTER_PORT", "?")
        return f"port {port} is in use on this node; give torchrun another --rdzv-endpoint or --master-port"
    if "/dev/shm" in text or (
        isinstance(error, dist.DistBackendError) and world.watch.step is None and _shm_is_short()
    ):
        return (
            f"shared memory is short: /dev/shm has {_shm_free() // MIB} MiB free, NCCL wants at least "
            f"{SMALL_SHM // MIB}; start the container with --shm-size=8g, or set NCCL_SHM_DISABLE=1"
        )
    if _lost_contact(error):
        when = "before the first step" if world.watch.step is None else f"step {world.watch.step}"
        why = f"{world.watch.missing()}{_said_by_nccl(text)}{_killed_for_memory()}"
        return f"{when}: contact to the other ranks was lost: {why}"
    if isinstance(error, OSError) and number in _DISK:
        where = error.filename or config.run_dir
        if number in (errno.ENOSPC, errno.EDQUOT):
            return f"{where} can't be written any more: {why_full(error, where)}; {FREE} and start again"
        return f"{where} can't be read or written any more ({error.strerror}); fix that and start again"
    return None


def _oom_kills() -> int:
    """How many processes the kernel of this machine has killed because memory ran out."""
    lines = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


_OOM_KILLS_BEFORE = _oom_kills()


def _killed_for_memory() -> str:
    """The rest of a sentence on a rank that died: was it killed because memory ran out?"""
    killed = _oom_kills() - _OOM_KILLS_BEFORE
    return f" (here the kernel has killed {killed} since the start because host memory ran out)" if killed else ""


def _said_by_nccl(text: str) -> str:
    """The rest of a sentence: NCCL's own reason, which ends torch's message where there is one."""
    reason = " ".join(text.partition("Last error:")[2].split())
    return f" (NCCL: {reason[:200]})" if reason else ""


def _fault_line(error: BaseException) -> str:
    """What a GPU's fault is, in the words of CUDA: NCCL's message begins with other lines."""
    return next((line[:200] for line in str(error).splitlines() if GPU_FAULT.search(line)), first_line(error))


def name_gpu(world: World) -> str:
    """UUID and serial number of this rank's GPU, as a part of a sentence. By nvidia-smi: after a fault CUDA answers
    nothing in this process."""
    gpus = visible_gpus(query_gpus()[0], os.environ.get("CUDA_VISIBLE_DEVICES"))
    number = world.device.index or 0  # by Slurm's binding each rank of a node may have number 0 of its own
    if number >= len(gpus):
        return ""
    gpu = gpus[number]
    known = ", ".join(part for part in (gpu.uuid, f"serial {gpu.serial}" if gpu.serial else "") if part)
    return f" ({known})" if known else ""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _lost_contact(error: BaseException) -> bool:
    if _out_of_memory(error) or is_gpu_fault(error) or _NO_ROOM_FOR_NCCL.search(str(error)):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _CONTACT_LOST.search(str(error)) is not None
    )


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and (_HOST_MEMORY.search(text) is not None or _NO_THREAD in text)


def _memory(error: BaseException, world: World) -> str:
    """What was asked for, and what was there."""
    if isinstance(error, torch.OutOfMemoryError):
        found = _GPU_ASKED.search(str(error))
        asked = f"{found[1]} asked for" if found else first_line(error)
        free, total = torch.cuda.mem_get_info(world.device)
        there = f"{free / 2**30:.1f} of its {total / 2**30:.1f} GiB are free"
        return f"out of GPU memory on {world.watch.names[world.rank]}: {asked}, {there}"
    host = _HOST_MEMORY.search(str(error))
    asked = f"{int(host[1]) / 2**30:.1f} GiB asked for" if host else first_line(error) or "none left"
    if _NO_THREAD in str(error):
        asked += " (or too many processes: ulimit -u)"
    return (
        f"out of host memory on {world.watch.names[world.rank]}: {asked}, {available_memory() / 2**30:.1f} GiB are free"
    )


def _room_mib(world: World) -> float:
    """MiB that a step could have, were nothing else there."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[1] / MIB
    used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
    return (available_memory() + used) / MIB


def largest_fitting_batch(config: Config, room_mib: float) -> str:
    """What `pipeline estimate` says fits, as the rest of a sentence; how to ask it where it gives no answer."""
    saved = RunPaths(Path(config.run_dir).expanduser()).config
    ask = ["estimate", "--config", str(saved), "--card_mib", f"{room_mib:.0f}", "--data.root", ""]
    remedy = "; lower --train.micro_batch_size"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *ask, "--json"],
            env=without_launcher() | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=_ESTIMATE_LIMIT_S,
            check=True,
        )
        largest = int(json.loads(done.stdout.splitlines()[-1])["largest_batch"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError):
        return f"{remedy} (see: pipeline {' '.join(ask[:-2])})"
    if largest < 1:
        return "; by `pipeline estimate` not even one image fits: take a smaller model or image"
    most = f"at most {count(largest, 'image')} at once"
    return f"; by `pipeline estimate` {most}: give --train.micro_batch_size {largest} or less"


def _shm_is_short() -> bool:
    """May NCCL have failed for want of shared memory, which it takes when it starts?"""
    return os.environ.get("NCCL_SHM_DISABLE") != "1" and _shm_free() < SMALL_SHM


def _shm_free() -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage("/dev/shm").free
    return SMALL_SHM
