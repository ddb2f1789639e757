"""Facts about one machine: its GPUs, its versions, and whether it can read the data and write the run folder.

Under Slurm every node of a job prints them as one JSON line, and `preflight` compares the lines. Does not import torch.
"""

import importlib.metadata
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config, DataConfig
from pipeline.dataset.index.index import Split, has_index, locate_index, open_sound
from pipeline.dataset.index.left_out import describe
from pipeline.dataset.index.notes import nested_lines
from pipeline.dataset.layouts.find import find_layout
from pipeline.errors import UserError, permission_problem
from pipeline.files import why_unfit
from pipeline.gpu_facts import (
    builds_problem,
    cuda_builds,
    driver_problem,
    granted_gpus,
    query_gpus,
    sign_of_gpus,
    smi_problem,
    visible_gpus,
)
from pipeline.limits import available_cores

SAMPLES = 16  # read and compared with their digests on every node
_UNKNOWN: dict[str, Any] = {
    "problem": None,
    "indexed": False,
    "fingerprint": None,
    "shards": 0,
    "images": None,
    "read_s": None,
}
PACKAGES = {"DALI": "nvidia-dali-cuda", "NCCL": "nvidia-nccl-cu"}  # name -> how its distributions begin


def gather_facts(config: Config) -> dict:
    """The facts of this machine, as plain values.

    Keys: node, cpus, gpus (as `Gpu`, those that CUDA_VISIBLE_DEVICES leaves), driver, driver_problem (or None),
    smi_problem (what nvidia-smi says where it fails, or None), sign_of_gpus (why there should be some, where there are
    none; or None), granted_gpus (by Slurm), open_files (that a process may have at most; -1: any number), versions,
    run_folder (a problem, or None), and data ({problem, fingerprint, shards, read_s}).
    """
    gpus, driver = query_gpus()
    builds = cuda_builds()
    problem = driver_problem(driver, builds) if driver else None
    visible = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "cpus": available_cores(),
        "gpus": [asdict(gpu) for gpu in visible],
        "smi_problem": None if gpus else smi_problem(),
        "sign_of_gpus": None if visible else sign_of_gpus(),
        "driver": driver,
        "driver_problem": problem if problem and not cuda_works() else builds_problem(builds),
        "granted_gpus": granted_gpus(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "versions": versions(),
        "run_folder": probe_folder(Path(config.run_dir).expanduser()) if config.run_dir else None,
        "data": probe_data(config.data),
    }


def cuda_works() -> bool:
    """Does torch find a GPU? Asked of a process of its own. A driver that looks too old may do with CUDA's packages for
    forward compatibility."""
    program = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    try:
        return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def versions() -> dict[str, str | None]:
    """Versions of what determines results and speed, without importing any of it; None: not installed."""
    found = {"Python": platform.python_version(), "CUDA": cuda_builds().get("torch")}
    for name in ("torch", "torchvision"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    for name, prefix in PACKAGES.items():
        found[name] = next((version for dist, version in installed.items() if dist.startswith(prefix)), None)
    return found


def nearest_existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(place for place in [folder, *folder.absolute().parents] if place.exists())


def probe_folder(folder: Path) -> str | None:
    """Why a run can't be written into `folder`, or None. Missing folders are not made."""
    try:
        existing = nearest_existing(folder)
    except PermissionError as error:
        return f"{error.filename} can't be entered ({error.strerror})"
    unfit = why_unfit(existing, 4096)
    return None if unfit is None else f"{existing} {unfit}"


def probe_data(data: DataConfig) -> dict:
    """Open the index, look at every shard, read some samples. `problem` is None if all is well."""
    try:
        return _probe_data(data)
    except PermissionError as error:
        return {**_UNKNOWN, "problem": str(permission_problem(error))}


def _probe_data(data: DataConfig) -> dict:
    facts: dict[str, Any] = dict(_UNKNOWN)
    root = Path(data.root).expanduser()
    if not data.root or not root.is_dir():
        return facts | {
            "problem": f"--data.root {data.root or 'is missing'}: no such folder; give the data set's folder"
        }
    folder = locate_index(data)
    if not has_index(folder):
        existing = nearest_existing(folder)
        if not os.access(existing, os.W_OK | os.X_OK):
            remedy = f"build it elsewhere, with: pipeline index {root} --out DIR, and give --data.index DIR"
            facts["problem"] = f"no index, and {existing} can't be written: {remedy}"
            return facts
        try:
            find_layout(root.resolve())
        except UserError as error:
            facts["problem"] = str(error)
        return facts
    facts["indexed"] = True
    try:
        index = open_sound(folder)
        facts |= {"fingerprint": index.fingerprint, "classes": index.num_classes}
        facts["left_out"] = describe(index.left_out)
        facts["nested"] = nested_lines(index)
        facts["unscored"] = index.unscored_classes()
        facts["images"] = {name: len(index.splits[name]) for name in ("train", "val")}
        start = time.perf_counter()
        for split in index.splits.values():
            facts["shards"] += check_shards(split)
            check_samples(split)
        facts["read_s"] = round(time.perf_counter() - start, 3)
    except (UserError, OSError) as error:
        facts["problem"] = str(error)
    return facts


def check_shards(split: Split) -> int:
    """How many shards a split has. Raises UserError for one that is missing or too short for its samples."""
    in_shard = split.records["shard"] >= 0
    ends = np.zeros(len(split.shards), np.int64)
    np.maximum.at(ends, split.records["shard"][in_shard], (split.records["offset"] + split.records["size"])[in_shard])
    for name, end in zip(split.shards, ends.tolist(), strict=True):
        path = split.root / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"shard {path}: {error.strerror}; pack or copy it again") from error
        if size < end:
            raise UserError(f"shard {path} has {size:,} bytes, its samples end at {end:,}; pack or copy it again")
    return len(split.shards)


def check_samples(split: Split, count: int = SAMPLES) -> None:
    """Read `count` samples, evenly spread. Raises UserError for one that is missing or has other bytes than indexed."""
    import xxhash

    for sample in np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist():
        record, path = split.records[sample], split.path(sample)
        try:
            with path.open("rb") as file:
                file.seek(int(record["offset"]))
                content = file.read(int(record["size"]))
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}); is it on a disk that this node sees?") from error
        if xxhash.xxh3_64_intdigest(content) != int(record["digest"]):
            raise UserError(f"{path}: sample {split.name(sample)} has other bytes than indexed; see: pipeline verify")
