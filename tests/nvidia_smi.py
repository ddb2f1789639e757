"""A stand-in for nvidia-smi: an executable that answers as a machine with such GPUs would."""

import json
import os
import sys
from pathlib import Path

import pytest

H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "memory.total": "81559",
    "driver_version": "580.95.05",
    "uuid": "GPU-0000{n}aaa-1111-2222-3333-444455556666",
    "serial": "165292300000{n}",
    "pci.bus_id": "00000000:{n}7:00.0",
    "mig.mode.current": "Disabled",
    "compute_cap": "9.0",
}

PROGRAM = """#!{python}
import json, sys
gpus = json.loads({gpus!r})
query = [item.partition("=")[2].split(",") for item in sys.argv[1:] if item.startswith("--query-gpu=")]
if "--list-gpus" in sys.argv or "-L" in sys.argv:
    for number, gpu in enumerate(gpus):
        print(f"GPU {{number}}: {{gpu['name']}} (UUID: {{gpu['uuid']}})")
elif query:
    for field in query[0]:
        if field not in gpus[0]:
            print(f'Field "{{field}}" is not a valid field to query.')
            sys.exit(2)
    for gpu in gpus:
        print(", ".join(gpu[field] for field in query[0]))
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 8, **changes: str) -> None:
    """Put it first on PATH: `count` GPUs like an H100's node, with other values of some fields (dots as underscores;
    None: nvidia-smi does not know this field)."""
    gpus = []
    for number in range(count):
        gpu = {key: value.format(n=number) for key, value in H100.items()}
        for key, value in changes.items():
            known = next(name for name in gpu if name.replace(".", "_") == key)
            if value is None:
                del gpu[known]
            else:
                gpu[known] = value
        gpus.append(gpu)
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(PROGRAM.format(python=sys.executable, gpus=json.dumps(gpus)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def install_broken(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str, code: int) -> None:
    """One that can't reach the driver or a GPU: it prints this and ends with an exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nprint({says!r})\nraise SystemExit({code})\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
