"""What this machine's GPUs and their driver are, by nvidia-smi, the kernel's files and Slurm; no torch."""

import csv
import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: CUDA's major version -> the oldest driver that runs programs built for it (CUDA release notes, "minor version
#: compatibility")
OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
HIDDEN = ("", "-1", "NoDevFiles")  # of CUDA_VISIBLE_DEVICES: the user, or Slurm, has hidden all GPUs

#: what only another GPU, or a reset of this one, fixes
GPU_FAULT = re.compile(
    r"uncorrectable (ECC|NVLink)|hardware stack error|fallen off the bus|GPU is lost|"
    r"CUDA-capable device\(s\) is/are busy or unavailable|XID \d+|"
    r"(CUDA error: |Cuda failure (\d+ )?')"  # as torch says it, and NCCL
    r"(unknown error|an illegal memory access|unspecified launch failure|misaligned address|an illegal instruction|"
    r"invalid program counter|the launch timed out)|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|"
    r"CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)",
    re.IGNORECASE,
)

_PLAIN = ("name", "memory.total", "driver_version")
_FIELDS = (*_PLAIN, "uuid", "serial", "pci.bus_id", "mig.mode.current", "compute_cap")
_LIMIT_S = 60.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi shows it.

    Attributes:
        name: of the product.
        memory_mib: None where nvidia-smi does not say.
        uuid, serial, bus_id: empty where nvidia-smi does not say.
        mig: is it split into MIG instances?
        capability: its compute capability, such as [9, 0]; empty where nvidia-smi does not say.
    """

    name: str
    memory_mib: float | None = None
    uuid: str = ""
    serial: str = ""
    bus_id: str = ""
    mig: bool = False
    capability: Sequence[int] = ()


def query_gpus() -> tuple[list[Gpu], str | None]:
    """(the GPUs of this machine in the order of nvidia-smi, driver version); ([], None) where there are none."""
    rows = _query(_FIELDS) or _query(_PLAIN)  # an old driver does not know all fields
    known = [{key: "" if value.startswith("[") else value for key, value in row.items()} for row in rows]  # [N/A]
    gpus = [
        Gpu(
            row["name"],
            _number(row["memory.total"]),
            row.get("uuid", ""),
            row.get("serial", ""),
            row.get("pci.bus_id", ""),
            row.get("mig.mode.current") == "Enabled",
            [int(part) for part in row.get("compute_cap", "").split(".") if part.isdecimal()],
        )
        for row in known
    ]
    return gpus, known[0]["driver_version"] or None if known else None


def _query(fields: Sequence[str]) -> list[dict[str, str]]:
    try:
        done = _ask(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields) and not done.returncode]


def _ask(*options: str) -> subprocess.CompletedProcess:
    """What nvidia-smi says. Raises OSError and TimeoutExpired; one that hangs in the driver can't be killed, and stays
    behind."""
    process = subprocess.Popen(["nvidia-smi", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def smi_problem() -> str | None:
    """Why nvidia-smi does not answer, in its own words, such as "Failed to initialize NVML: Driver/library version
    mismatch"; None: it answers, or is not installed."""
    try:
        done = _ask("--list-gpus")
    except subprocess.TimeoutExpired:
        return f"no answer within {_LIMIT_S:.0f} s"
    except OSError:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return (lines or [f"exit code {done.returncode}"])[0][:200] if done.returncode else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def visible_gpus(gpus: Sequence[Gpu], wanted: str | None) -> list[Gpu]:
    """Those of `gpus` that a program may use by CUDA_VISIBLE_DEVICES (`wanted`): numbers, or UUIDs from their
    beginning. As CUDA does, it ends at the first entry that is none of them; a MIG instance has unknown memory."""
    if wanted is None:
        return list(gpus)
    found: list[Gpu] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if entry.startswith("MIG-"):
            found.append(Gpu(f"MIG instance {entry}", mig=True))
        elif entry.isdecimal() and int(entry) < len(gpus):
            found.append(gpus[int(entry)])
        elif entry.startswith("GPU-") and any(gpu.uuid.startswith(entry) for gpu in gpus):
            found.append(next(gpu for gpu in gpus if gpu.uuid.startswith(entry)))
        else:
            break
    return found


def granted_gpus(environ: Mapping[str, str] = os.environ) -> int:
    """How many GPUs Slurm has granted on this node; 0 outside a job, or where it does not say."""
    on_node, per_task = environ.get("SLURM_GPUS_ON_NODE", ""), environ.get("SLURM_GPUS_PER_TASK", "")
    if on_node.isdecimal():
        return int(on_node)
    listed = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS")
    if listed:
        return len(listed.split(","))
    numbers = [int(part) for part in re.findall(r"(?:^|[:,])(\d+)(?=,|$)", per_task)]  # 2, or h100:2
    return sum(numbers)


def sign_of_gpus(device_file: Path = Path("/dev/nvidia0")) -> str | None:
    """Why this process should find a GPU, as the rest of "though ..."; None: nothing says so, or they are hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in HIDDEN:
        return None
    granted = granted_gpus()
    if granted:
        return f"Slurm granted {granted}"
    if device_file.exists():
        return f"{device_file} exists"
    gpus, _ = query_gpus()
    return f"nvidia-smi lists {len(gpus)}" if gpus else None


def cuda_builds() -> dict[str, str]:
    """The CUDA versions that torch, NCCL and DALI are built for, without importing any; absent: not installed, or built
    without CUDA."""
    found = {}
    torch = _cuda_of_torch()
    if torch:
        found["torch"] = torch
    names = [d.name.lower() for d in importlib.metadata.distributions() if d.name]
    for name, pattern in (("NCCL", r"nvidia-nccl-cu(\d+)$"), ("DALI", r"nvidia-dali-cuda(\d\d)\d$")):
        versions = [match[1] for match in (re.match(pattern, dist) for dist in names) if match]
        if versions:
            found[name] = max(versions, key=int)
    return found


def _cuda_of_torch() -> str | None:
    """The CUDA version that torch was built for, from its version.py."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    match = re.search(
        r"^cuda\b.*=\s*'([\d.]+)'", Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    return match[1] if match else None


def driver_problem(driver: str, builds: Mapping[str, str]) -> str | None:
    """What of `builds` (as of `cuda_builds`) this driver is too old for, in words; None: nothing."""
    parts = [int(part) for part in re.findall(r"\d+", driver)[:2]]
    for name, cuda in builds.items():
        oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
        if oldest is not None and tuple(parts) < oldest:
            return (
                f"driver {driver} is too old for {name}, which is built for CUDA {cuda} and requires "
                f"driver {oldest[0]}.{oldest[1]} or newer"
            )
    return None


def kernels_problem(capability: Sequence[int], kernels: Sequence[str]) -> str | None:
    """Why a GPU of this compute capability can't run torch's kernels, and the remedy, in words; None: it can, or that
    is not known. kernels: as torch.cuda.get_arch_list: "sm_90" runs on 9.x, "compute_90" on all from 9.0 on."""
    major, minor = (*capability, 0, 0)[:2]
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", kernel) for kernel in kernels]
    known = [(match[1], int(match[2]), int(match[3])) for match in found if match]
    if not (known and major) or any(
        (kind == "compute" or a == major) and (a, b) <= (major, minor) for kind, a, b in known
    ):
        return None
    least, most = (min(known, key=lambda item: item[1:]), max(known, key=lambda item: item[1:]))
    return (
        f"this torch has no kernels for compute capability {major}.{minor} (it has {least[1]}.{least[2]} to "
        f"{most[1]}.{most[2]}); install one that has: older cards are in builds for an older CUDA"
    )


def is_gpu_fault(error: BaseException) -> bool:
    """Did a GPU or its link fail, such that the same GPU should not be tried again?"""
    return isinstance(error, RuntimeError) and GPU_FAULT.search(str(error)) is not None


def builds_problem(builds: Mapping[str, str]) -> str | None:
    """Where torch and NCCL are built for different major versions of CUDA, in words; None: they are not. (DALI brings
    its own CUDA libraries, and only requires a driver that is new enough.)"""
    torch, nccl = builds.get("torch"), builds.get("NCCL")
    if torch and nccl and torch.split(".")[0] != nccl:
        return f"torch is built for CUDA {torch}, NCCL for CUDA {nccl}; install nvidia-nccl-cu{torch.split('.')[0]}"
    return None


def why_no_cuda() -> str:
    """Why torch finds no GPU here, and the remedy, in words."""
    builds = cuda_builds()
    if "torch" not in builds:
        return "torch is a build without CUDA; install one with CUDA"
    gpus, driver = query_gpus()
    if driver is None:
        said = smi_problem()
        said = f"nvidia-smi fails ({said})" if said else "nvidia-smi lists none"
        return f"{said}; ask whoever runs this machine whether the driver is loaded"
    problem = driver_problem(driver, {"torch": builds["torch"]})
    if problem:
        return f"{problem}; have the driver updated, or install a torch that is built for an older CUDA"
    if not visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")):
        return f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')} names none of {len(gpus)} GPUs"
    return f"{len(gpus)} x {gpus[0].name} with driver {driver} can't be used; see nvidia-smi and dmesg"
