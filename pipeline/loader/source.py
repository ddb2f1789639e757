"""The bytes of a sample, from an image tree or tar shards, checked against the index's digest.

The check costs a hundredth of a decode. With it every loader detects a damaged, truncated or replaced file at its
first use, whichever window is cropped from it.
"""

import contextlib
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from pipeline.dataset.index.index import Split
from pipeline.errors import TransientError
from pipeline.limits import SPARE_FILES, open_files_limit

_TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN, errno.EHOSTDOWN}
_LOCAL_LIMITS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # this process's limits, not the file's fault
_RETRY_AFTER_S = (0.1, 1.0, 5.0)  # short failures of a network file system


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


class _OpenShard:
    """A shard open for reading; it closes with the last reference to it, so that no thread's read is cut off."""

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never open
            os.close(self.descriptor)


class Source:
    """Reads the bytes of samples of a split; safe to use from several threads.

    Args:
        split: from the index.
        threads: files read at once by `read_batch`.
    """

    def __init__(self, split: Split, threads: int = 8):
        self.split = split
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.threads = threads
        self._shards: OrderedDict[int, _OpenShard] = OrderedDict()  # by the time of their last use
        self._most_open = max(_FEWEST_SHARDS, open_files_limit(_SHARE * len(split.shards) + SPARE_FILES) // _SHARE)
        self._lock = threading.Lock()
        self._busy: dict[int, tuple[float, int]] = {}  # thread -> (start time, sample id) of its read

    def _shard(self, sample_id: int, number: int) -> _OpenShard:
        """A shard, opened; those that were not used for longest are closed where too many would be open."""
        with self._lock:
            shard = self._shards.get(number)
            if shard is None:
                shard = self._shards[number] = _OpenShard(self.split.path(sample_id))
                while len(self._shards) > self._most_open:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(number)
            return shard

    def _read(self, sample_id: int, shard: int, offset: int, size: int) -> bytes:
        if shard >= 0:
            opened = self._shard(sample_id, shard)  # held: it may be dropped by other threads meanwhile
            return os.pread(opened.descriptor, size, offset)
        with open(self.split.path(sample_id), "rb") as file:  # noqa: PTH123 - the shorter way, for every sample
            return file.read(size + 1)  # bounded: the file may have been replaced by an endless one

    def read(self, sample_id: int, prepare: Prepare = _as_it_is) -> np.ndarray:
        """The sample's bytes, uint8 [size], or what `prepare` makes of them.

        Raises UnreadableSample where they are missing or differ from those indexed, and TransientError where the data
        root itself is gone. Transient errors (of a network file system) are retried for some seconds.
        """
        (row,) = self._rows(np.array([sample_id]))
        return self._prepared(row, prepare)

    def _rows(self, sample_ids: np.ndarray) -> list[tuple[int, int, int, int, int]]:
        """(sample id, shard, offset, size, digest) of each: the index is asked once for all, not a field at a time."""
        records = self.split.records[sample_ids]
        fields = (records[name].tolist() for name in ("shard", "offset", "size", "digest"))
        return list(zip(sample_ids.tolist(), *fields, strict=True))

    def _checked(self, sample_id: int, shard: int, offset: int, size: int, digest: int) -> np.ndarray:
        for wait in (*_RETRY_AFTER_S, None):
            try:
                self._busy[threading.get_ident()] = time.monotonic(), sample_id
                data = self._read(sample_id, shard, offset, size)
                break
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) in _LOCAL_LIMITS:
                    raise
                if not self.split.root.is_dir():
                    raise TransientError(f"data root {self.split.root} is gone: {error}") from error
                late = isinstance(error, FileNotFoundError) and not self._sees_folder(sample_id)
                if wait is None or not (late or getattr(error, "errno", None) in _TRANSIENT):
                    raise UnreadableSample(sample_id, str(error)) from error
                time.sleep(wait)
            finally:
                self._busy.pop(threading.get_ident(), None)
        if len(data) != size:
            raise UnreadableSample(sample_id, f"has {len(data)} bytes, {size} when it was indexed")
        if xxhash.xxh3_64_intdigest(data) != digest:
            raise UnreadableSample(sample_id, "its bytes have changed since it was indexed")
        return np.frombuffer(data, np.uint8)

    def _sees_folder(self, sample_id: int) -> bool:
        """Does this node see the folder of a sample's file? A network file system may show a new one late: listing the
        folder above asks its server anew."""
        folder = self.split.path(sample_id).parent
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)
        return folder.is_dir()

    def _prepared(self, row: tuple[int, int, int, int, int], prepare: Prepare) -> np.ndarray:
        data = self._checked(*row)
        try:
            return prepare(data)
        except (OSError, ValueError) as error:
            raise UnreadableSample(row[0], str(error)) from error

    def _read_part(
        self, rows: list[tuple[int, int, int, int, int]], prepare: Prepare
    ) -> list[np.ndarray | UnreadableSample]:
        parts: list[np.ndarray | UnreadableSample] = []
        for row in rows:
            try:
                parts.append(self._prepared(row, prepare))
            except UnreadableSample as error:
                parts.append(error)
        return parts

    def read_batch(self, sample_ids: np.ndarray, prepare: Prepare = _as_it_is) -> list[np.ndarray | UnreadableSample]:
        """The bytes of each sample, read and prepared by several threads; for an unreadable one its exception,
        returned."""
        rows = self._rows(sample_ids)
        size = max(1, -(-len(rows) // self.threads))
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        parts = self.pool.map(self._read_part, chunks, [prepare] * len(chunks))
        return [item for part in parts for item in part]

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
        self.pool.shutdown(cancel_futures=True)
        self._shards.clear()
