"""A bench's result as a JSON file, beside the command, the machine and the versions."""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import atomic_write
from pipeline.insight.bench.machine import describe_machine

FOLDER = Path("runs/bench")


def default_path(name: str) -> Path:
    return FOLDER / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def write_result(path: Path, name: str, command: Sequence[str], result: dict[str, Any]) -> None:
    """Write the file and print its path. Raises UserError where it can't be written. command: as it was typed; where it
    wrote this file is left out."""
    contents: dict[str, Any] = {
        "bench": name,
        "command": shlex.join(without_option(command, "--json")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine(),
        **{key: result[key] for key in ("images_per_s", "world_size") if key in result},  # for preflight
        "result": result,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(contents, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} can't be written ({error.strerror}); give another file") from error
    print(f"\n{path}", flush=True)


def without_option(command: Sequence[str], name: str) -> list[str]:
    """A command without `name VALUE` and `name=VALUE`."""
    return [
        item
        for before, item in zip(["", *command], command, strict=False)
        if name not in (before, item) and not item.startswith(f"{name}=")
    ]
