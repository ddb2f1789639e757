"""The bytes of a sample, from an image tree or tar shards, checked against the index's digest.

The check costs a hundredth of a decode. With it every loader detects a damaged, truncated or replaced file at its
first use, whichever window is cropped from it.

Of a sample with restart markers only the rows of MCUs that a window touches are read, and checked row by row; the
decoder is given a small JPEG with the part that holds the window (`dataset/shards/restart.py`).
"""

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from pipeline.counts import count
from pipeline.dataset.index.index import Split
from pipeline.dataset.shards.restart import TABLE, Cut, TableError, plan_cut
from pipeline.errors import TransientError
from pipeline.files import PASSING
from pipeline.limits import SPARE_FILES, open_files_limit
from pipeline.loader.reading_threads import ReadingThreads
from pipeline.logs import logger

_LOCAL_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # this process's limits, not the file's fault
_RETRY_AFTER_S = (0.1, 1.0, 5.0)  # short failures of a network file system
T = TypeVar("T")

_FEWEST_SHARDS = 8  # kept open at once, however few files this process may open
_SHARE = 4  # of the files that this process may open, each split's shards may be one in so many

Prepare = Callable[[np.ndarray], np.ndarray]  #: a sample's bytes -> what its decoder is given


def _as_it_is(data: np.ndarray) -> np.ndarray:
    return data


class UnreadableSample(Exception):
    """A sample whose bytes are missing, changed or can't be decoded. `reason`: for the log."""

    def __init__(self, sample_id: int, reason: str):
        super().__init__(f"sample {sample_id}: {reason}")
        self.sample_id, self.reason = sample_id, reason


def _or_error(read: Callable[..., T], *arguments: Any) -> "T | UnreadableSample":
    """What `read` returns, or the UnreadableSample that it raises."""
    try:
        return read(*arguments)
    except UnreadableSample as error:
        return error


def _is_folder(path: Path) -> bool:
    """Is a folder there, and does its server answer?"""
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False


class _OpenShard:
    """A shard open for reading; it closes with the last reference to it, so that no thread's read is cut off."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never open
            os.close(self.descriptor)


class Piece(NamedTuple):
    """A JPEG that holds a window of a sample. data: uint8 [n]. left, top: where it begins in the sample, pixels."""

    data: np.ndarray
    left: int = 0
    top: int = 0


class Row(NamedTuple):
    """Where a sample's bytes lie. table_size: 0 where it has no restart markers."""

    sample_id: int
    shard: int
    offset: int
    size: int
    digest: int
    table_offset: int = 0
    table_size: int = 0


class Source:
    """Reads the bytes of samples of a split; safe to use from several threads.

    Args:
        split: from the index.
        threads: files read at once where batches are late.
    """

    def __init__(self, split: Split, threads: int = 8):
        self.split = split
        self.threads = ReadingThreads(threads)
        self._shards: OrderedDict[tuple[int, str], _OpenShard] = OrderedDict()  # (shard, suffix), by their last use
        files = len(split.shards) * (1 if split.restart is None else 2)
        self._most_open = max(_FEWEST_SHARDS, open_files_limit(_SHARE * files + SPARE_FILES) // _SHARE)
        self._lock = threading.Lock()
        self._without_table: set[int] = set()  # shards whose restart table does not fit
        self._gone: set[Path] = set()  # folders that did not come into sight within the waits of a read
        self._busy: dict[int, tuple[float, int]] = {}  # thread -> (start time, sample id) of its read

    def _shard(self, row: Row, suffix: str = "") -> _OpenShard:
        """A shard or (suffix) a file beside it, opened; those that were not used for longest are closed where too many
        would be open."""
        key = row.shard, suffix
        with self._lock:
            shard = self._shards.get(key)
            if shard is None:
                path = self.split.path(row.sample_id)
                shard = self._shards[key] = _OpenShard(path.with_suffix(suffix) if suffix else path)
                while len(self._shards) > self._most_open:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(key)
            return shard

    def _read_at(self, row: Row, start: int, size: int, suffix: str = "") -> bytes:
        """Bytes of a shard, or of a file beside it."""
        opened = self._shard(row, suffix)  # held: other threads may drop it
        try:
            return os.pread(opened.descriptor, size, start)
        except OSError:
            with self._lock:
                self._shards.pop((row.shard, suffix), None)  # a stale handle stays one
            raise

    def _read(self, row: Row) -> bytes:
        if row.shard >= 0:
            return self._read_at(row, row.offset, row.size)
        with open(self.split.path(row.sample_id), "rb") as file:  # noqa: PTH123 - the shorter way, for every sample
            return file.read(row.size + 1)  # bounded: the file may have been replaced by an endless one

    def read(self, sample_id: int, prepare: Prepare = _as_it_is) -> np.ndarray:
        """The sample's bytes, uint8 [size], or what `prepare` makes of them.

        Raises UnreadableSample where they are missing or differ from those indexed, and TransientError where the data
        root itself is gone. Transient errors (of a network file system) are retried for some seconds.
        """
        (row,) = self._rows(np.array([sample_id]))
        return self._prepared(row, prepare)

    def _rows(self, sample_ids: np.ndarray) -> list[Row]:
        """The index is asked once for all, not a field at a time."""
        records = self.split.records[sample_ids]
        fields = [records[name].tolist() for name in ("shard", "offset", "size", "digest")]
        if self.split.restart is not None:
            restart = self.split.restart[sample_ids]
            fields += [restart[name].tolist() for name in ("table_offset", "table_size")]
        return [Row(*row) for row in zip(sample_ids.tolist(), *fields, strict=True)]

    def _attempt(self, sample_id: int, read: Callable[[], T]) -> T:
        """What `read` returns; its transient errors are retried."""
        for wait in (*_RETRY_AFTER_S, None):
            try:
                self._busy[threading.get_ident()] = time.monotonic(), sample_id
                return read()
            except (OSError, ValueError) as error:
                number = getattr(error, "errno", None)
                if number in _LOCAL_LIMITS:
                    raise
                passes = number in PASSING
                if (wait is None or not passes) and not _is_folder(self.split.root):
                    raise TransientError(f"data root {self.split.root} is gone: {error}") from error
                late = isinstance(error, FileNotFoundError) and self._may_come_late(sample_id)
                if wait is None and late:
                    self._gone.add(self.split.path(sample_id).parent)
                if wait is None or not (late or passes):
                    raise UnreadableSample(sample_id, str(error)) from error
                time.sleep(wait)
            finally:
                self._busy.pop(threading.get_ident(), None)
        raise AssertionError  # the last attempt returns or raises

    def _checked(self, row: Row) -> np.ndarray:
        data = self._attempt(row.sample_id, lambda: self._read(row))
        if len(data) != row.size:
            raise UnreadableSample(row.sample_id, f"has {count(len(data), 'byte')}, {row.size:,} when it was indexed")
        if xxhash.xxh3_64_intdigest(data) != row.digest:
            raise UnreadableSample(row.sample_id, "its bytes have changed since it was indexed")
        return np.frombuffer(data, np.uint8)

    def _may_come_late(self, sample_id: int) -> bool:
        """Is the folder of a sample's file still to be waited for? A network file system may show a new one late:
        listing the folder above asks its server again. None is waited for in vain twice."""
        folder = self.split.path(sample_id).parent
        if folder in self._gone:
            return False
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)
        return not _is_folder(folder)

    def _prepared(self, row: Row, prepare: Prepare) -> np.ndarray:
        data = self._checked(row)
        try:
            return prepare(data)
        except (OSError, ValueError) as error:
            raise UnreadableSample(row.sample_id, str(error)) from error

    def _cut(self, row: Row, window: tuple[int, int, int, int]) -> Cut | None:
        """How to cut the window out of a sample; None where the sample is to be read as a whole."""
        if not row.table_size or row.shard in self._without_table:
            return None
        try:
            entry = self._attempt(row.sample_id, lambda: self._read_at(row, row.table_offset, row.table_size, TABLE))
            return plan_cut(entry, row.digest, window)
        except (TableError, UnreadableSample) as error:
            if row.shard not in self._without_table:
                self._without_table.add(row.shard)
                logger.warning(
                    "%s: restart table damaged or missing (%s); its images are read as a whole, which is slower; check "
                    "the data with: pipeline verify ROOT",
                    self.split.shards[row.shard],
                    error,
                )
            return None

    def _piece(self, row: Row, window: tuple[int, int, int, int], prepare: Prepare) -> Piece:
        """The part of a sample that holds a window."""
        cut = self._cut(row, window)
        if cut is None:
            return Piece(self._prepared(row, prepare))
        start, size = row.offset + cut.start, cut.size
        data = self._attempt(row.sample_id, lambda: self._read_at(row, start, size))
        try:
            return Piece(prepare(np.frombuffer(cut.assemble(data), np.uint8)), cut.left, cut.top)
        except (OSError, ValueError) as error:
            raise UnreadableSample(row.sample_id, str(error)) from error

    def read_batch(self, sample_ids: np.ndarray, prepare: Prepare = _as_it_is) -> list[np.ndarray | UnreadableSample]:
        """The bytes of each sample, prepared; for an unreadable one its exception, returned."""
        rows = self._rows(sample_ids)
        return self.threads.read_each(lambda i: _or_error(self._prepared, rows[i], prepare), len(rows))

    def read_windows(
        self, sample_ids: np.ndarray, windows: np.ndarray, prepare: Prepare = _as_it_is
    ) -> list[Piece | UnreadableSample]:
        """As `read_batch`, but of samples with restart markers only a part that holds the window.

        windows: int32 [B, 4], as in `Planned`. Inside its window every pixel of a part is the sample's.
        """
        rows, boxes = self._rows(sample_ids), [tuple(window) for window in windows.tolist()]
        return self.threads.read_each(lambda i: _or_error(self._piece, rows[i], boxes[i], prepare), len(rows))

    def slowest(self) -> str:
        """The file that is being read for the longest time, for messages; empty if none is being read."""
        since, sample_id = min(list(self._busy.values()), default=(0.0, -1))
        return "" if sample_id < 0 else f"reading {self.split.path(sample_id)} for {time.monotonic() - since:.0f} s"

    def describe(self, sample_id: int) -> str:
        """The sample's file, for messages."""
        name = self.split.name(sample_id)
        shard = int(self.split.records["shard"][sample_id])
        return name if shard < 0 else f"{self.split.shards[shard]}:{name}"

    def close(self) -> None:
        self.threads.close()
        self._shards.clear()
