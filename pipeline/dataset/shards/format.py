"""Tar shards that the `webdataset` package reads front to back and this project by offset.

A sample is two members that share a key: `n01440764/n01440764_10026.jpg` (its bytes) and `....cls` (its label as text).
A shard is written under a temporary name; beside it lie its records (`records.py`). A shard whose tar has its final
name is complete, and is never written again. A shard with restart markers has a table beside it (`restart.py`).
"""

import contextlib
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import xxhash

from pipeline.dataset.index.index import RESTART
from pipeline.dataset.lock import try_lock
from pipeline.dataset.shards.records import STATE, shard_name, write_records
from pipeline.dataset.shards.restart import MAGIC, make_entry, table_name
from pipeline.errors import TransientError, UserError
from pipeline.files import PASSING, atomic_write, reason_of

BLOCK = tarfile.BLOCKSIZE
_HEADER = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)  # with neither name nor size
SAMPLE_OVERHEAD = 3 * BLOCK + BLOCK // 2  #: bytes a sample: two headers, the label's block, half a block of padding


@dataclass(frozen=True)
class Sample:
    """One sample to be written.

    key: path without suffix, unique in its split; it holds no dot after its last '/'.
    suffix: without the dot, by which `webdataset` picks a decoder ("jpg").
    width, height: pixels, as stored. order: where it comes in the index; ties are broken by position. original: xxh3_64
    and bytes of the original, where restart markers were added.
    """

    key: str
    suffix: str
    data: bytes
    label: int
    width: int
    height: int
    order: int
    original: tuple[int, int] | None = None


def image_suffix(data: bytes, name: str) -> str:
    """The suffix of an image for `webdataset`: by its first bytes, or else by its name."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return name.rpartition(".")[2].lower()


def temporary_path(dest: Path, split: str, number: int) -> Path:
    """Where a shard is made."""
    return dest / f".{shard_name(split, number)}.tmp"


def tar_header(name: str, size: int) -> bytes:
    """Header of a tar member; one block for names of up to 100 bytes."""
    encoded = name.encode("utf-8", "surrogateescape")
    if len(encoded) > tarfile.LENGTH_NAME or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)
    header = bytearray(_HEADER)  # the same bytes in an eighth of the time
    header[: len(encoded)], header[124:136], header[148:156] = encoded, b"%011o\0" % size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def whole_size(size: int) -> int:
    """Bytes of a shard whose members take `size`: two empty blocks more, filled up to a record."""
    return -(-(size + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def make_row(sample: Sample, offset: int) -> tuple:
    """The row for `write_records` of a sample whose bytes lie at `offset`."""
    digest = xxhash.xxh3_64_intdigest(sample.data)
    return (digest, offset, len(sample.data), sample.width, sample.height, sample.label, sample.order)


class ShardWriter:
    """One shard. Leaving the context renames it to its final name; an exception leaves none.

    restart: write the restart table, too, and note each sample's original. temporary: instead of the usual path.
    Raises UserError where the disk is full or the folder can't be written.
    """

    def __init__(self, dest: Path, split: str, number: int, restart: bool = False, temporary: Path | None = None):
        self.dest, self.split, self.number = dest, split, number
        self.path = dest / shard_name(split, number)
        self.temporary = temporary or temporary_path(dest, split, number)
        self.bytes = 0
        self._table = bytearray(MAGIC) if restart else None
        self._restart: list[tuple[int, int, int, int]] = []  # of RESTART
        self.notes: list[dict] = []  #: outcomes of this shard's unreadable images; `merge_shards` returns them
        self._rows: list[tuple] = []
        self._names: list[str] = []

    def __enter__(self) -> "ShardWriter":
        try:
            (self.dest / STATE).mkdir(parents=True, exist_ok=True)
            self._file = self._open()
        except OSError as error:
            raise self._explain(error) from error
        return self

    def _open(self) -> BinaryIO:
        """The temporary file, empty, and ours alone where the file system has locks."""
        while True:
            file = self.temporary.open("ab", buffering=1 << 20)
            try:
                if not try_lock(file):
                    raise UserError(f"another process is writing {self.path}; wait for it or stop it")
            except BaseException:
                file.close()
                raise
            if self.temporary.exists() and os.path.samestat(os.fstat(file.fileno()), self.temporary.stat()):
                file.truncate(0)
                return file
            file.close()  # another process has just finished it

    def _explain(self, error: OSError) -> UserError | TransientError:
        reason = reason_of(error, self.path)
        if error.errno in PASSING:
            return TransientError(f"can't write {self.path} ({reason}); run the same command again")
        return UserError(
            f"can't write {self.path} ({reason}); fix that or give another folder, and run the command again"
        )

    def _member(self, name: str, data: bytes) -> int:
        """Write one member; returns the offset of its bytes."""
        header, padding = tar_header(name, len(data)), bytes(-len(data) % BLOCK)
        self._file.write(header)
        self._file.write(data)
        self._file.write(padding)
        offset = self.bytes + len(header)
        self.bytes = offset + len(data) + len(padding)
        return offset

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        name = f"{sample.key}.{sample.suffix}"
        try:
            offset = self._member(name, sample.data)
            self._member(f"{sample.key}.cls", str(sample.label).encode())
        except OSError as error:
            raise self._explain(error) from error
        row = make_row(sample, offset)
        self._rows.append(row)
        self._names.append(name)
        if self._table is not None:
            entry = make_entry(sample.data, row[0]) or b""
            self._restart.append((*(sample.original or (row[0], row[2])), len(self._table), len(entry)))
            self._table += entry

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._drop()
            self.temporary.unlink(missing_ok=True)
            return
        try:
            self._file.write(bytes(whole_size(self.bytes) - self.bytes))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            restart = None
            if self._table is not None:
                restart = np.array(self._restart, RESTART)
                atomic_write(self.dest / table_name(self.path.name), bytes(self._table))
            write_records(self.dest, self.split, self.number, self._rows, self._names, self.notes, restart)
            self.temporary.replace(self.path)
        except OSError as failure:
            raise self._explain(failure) from failure
        finally:
            self._drop()
            self.temporary.unlink(missing_ok=True)

    def _drop(self) -> None:
        """Close the file; that what is left in its buffer finds no space either is no news."""
        with contextlib.suppress(OSError):
            self._file.close()
