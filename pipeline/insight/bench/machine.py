"""The machine and the versions that a figure was measured with."""

import importlib.metadata
import os
import platform
from pathlib import Path

from pipeline.limits import available_cores, memory_limit

_PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "numpy", "pillow", "timm", "ffcv")


def describe_machine() -> dict:
    """Processor, cores, memory, load, GPU, versions: plain values."""
    facts = {
        "processor": _processor(),
        "cores": available_cores(),
        "memory_gib": round(memory_limit() / 2**30, 1),
        "load": [round(value, 1) for value in os.getloadavg()],
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions(),
    }
    return facts | _gpu()


def versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu() -> dict:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None}
    return {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "cuda": torch.version.cuda}
