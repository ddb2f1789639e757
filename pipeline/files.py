"""Small files that are there whole or not at all, after a power cut too."""

import os
from pathlib import Path


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file under a temporary name beside it (`.NAME.PID.tmp`), bring it to the disk, and rename it to `path`.
    Raises OSError; then what was there before still is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
