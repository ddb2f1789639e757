"""Atomic writes: a file is complete or absent, after a power failure too."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_open(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write, beside `path` under a temporary name (`.NAME.PID-HEX.tmp`). At the end of the block it
    is flushed to disk and renamed to `path`. If the block raises, it is removed and `path` is unchanged.
    durable: False skips the flush, for files that can be generated again. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: str | bytes, durable: bool = True) -> None:
    """Write a small file atomically, as `atomic_open` does. Text is written as UTF-8. Raises OSError."""
    with atomic_open(path, durable) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def read_note(path: Path) -> str:
    """The text of a small file, or of a link that stands for it: a link can be made on a full disk, its target is the
    text. Raises OSError."""
    return str(path.readlink()) if path.is_symlink() else path.read_text()
