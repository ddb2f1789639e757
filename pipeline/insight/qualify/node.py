"""Facts of the node: driver against CUDA, GPUs, their links, limits. No torch."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipeline.gpu_facts import builds_problem, cuda_builds, driver_problem, granted_gpus, query_gpus
from pipeline.insight.qualify.rows import Row, Settings, judged, skipped
from pipeline.limits import available_cores, files_needed, memory_limit

_SHM_MIB = 256
_QUERY = ("ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown", "pcie.link.gen.current")


def node(settings: Settings) -> Iterator[Row]:
    """What an operator would look up by hand."""
    yield Row("cores and memory", f"{available_cores()} cores, {memory_limit() / 2**30:.0f} GiB")
    builds = cuda_builds()
    gpus, driver = query_gpus()
    yield Row("CUDA builds", ", ".join(f"{name} for {version}" for name, version in builds.items()) or "none")
    problem = builds_problem(builds)
    yield judged("torch and NCCL fit", problem or "same CUDA", "same major version of CUDA", problem is None)
    if gpus:
        yield Row("GPUs", f"{len(gpus)} x {gpus[0].name}, driver {driver}")
        granted = granted_gpus()
        if granted:  # one may have fallen off the bus
            yield judged("GPUs by Slurm", f"{settings.gpus} of {granted} granted", "all", settings.gpus >= granted)
        problem = driver_problem(driver or "", builds)
        yield judged("driver", problem or f"{driver} runs all of them", "not too old", problem is None)
        yield judged("same GPU model", str(len({gpu.name for gpu in gpus})), "1 kind", len({g.name for g in gpus}) == 1)
        split = sum(gpu.mig for gpu in gpus)
        yield judged("MIG", f"{split} of {len(gpus)} split", "none", split == 0)
        yield from _health()
        yield Row("links", _topology())
        numactl = shutil.which("numactl")
        yield Row("numactl", numactl or "not installed: ranks are not bound to the cores beside their GPU")
    else:
        yield skipped("GPUs", "none seen by nvidia-smi")
    shm = shutil.disk_usage("/dev/shm").free // 2**20 if Path("/dev/shm").is_dir() else 0
    if settings.gpus > 1:
        yield judged("/dev/shm", f"{shm:,} MiB free", f"at least {_SHM_MIB} MiB for NCCL", shm >= _SHM_MIB)
    else:  # as a container has it by default: nothing but NCCL needs it
        yield Row("/dev/shm", f"{shm:,} MiB free")
    hard, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[1], files_needed(512)
    yield judged(
        "open files",
        f"{hard:,}" if hard >= 0 else "any number",
        f"{needed:,} for 512 ranks",
        hard < 0 or hard >= needed,
    )
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    yield Row("locked memory", "any amount" if locked < 0 else f"{locked / 2**20:,.0f} MiB (InfiniBand wants no limit)")
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    yield Row(
        "NUMA", f"{nodes} node{'' if nodes == 1 else 's'}, this process may use {len(os.sched_getaffinity(0))} cores"
    )


def _health() -> Iterator[Row]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    if done.returncode or any(len(line) != len(_QUERY) for line in lines):
        yield skipped("ECC and throttling", "nvidia-smi does not say")
        return
    errors = [int(line[0]) for line in lines if line[0].isdecimal()]
    yield judged("uncorrected ECC errors", str(sum(errors)) if errors else "not counted", "0", not sum(errors))
    slowed = sum(line[1] == "Active" for line in lines)
    yield judged("slowed down by hardware", f"{slowed} GPUs", "0", slowed == 0)
    yield Row("PCIe generation", ", ".join(sorted({line[2] for line in lines})))


def _topology() -> str:
    done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60)
    links = sorted({word for word in done.stdout.split() if word.startswith("NV") and word[2:].isdecimal()})
    return ", ".join(links) or "no NVLink seen"
