"""The bytes of a sample, from an image tree or tar shards, checked against the index's digest.

The check costs a hundredth of a decode, and it means that a damaged, truncated or exchanged file is noticed at its
first use, whichever window is cut from it, by every loader alike.
"""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash

from pipeline.dataset.index.index import Split
from pipeline.errors import TransientError

_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN, errno.EHOSTDOWN}
_OURS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # no fault of the file's
_RETRY_AFTER_S = (0.1, 1.0, 5.0)  # a network file system's hiccup


class UnreadableSample(Exception):
    """A sample whose bytes are gone, changed or can't be decoded. `sample`: id; `reason`: for the log."""

    def __init__(self, sample: int, reason: str):
        super().__init__(f"sample {sample}: {reason}")
        self.sample, self.reason = sample, reason


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
        self._shards: dict[int, int] = {}
        self._lock = threading.Lock()
        self._busy: dict[int, tuple[float, int]] = {}  # thread -> since when it reads which sample

    def _shard(self, sample: int, number: int) -> int:
        """The file descriptor of a shard, opened once."""
        with self._lock:
            if number not in self._shards:
                self._shards[number] = os.open(self.split.path(sample), os.O_RDONLY)
            return self._shards[number]

    def _read(self, sample: int, shard: int, offset: int, size: int) -> bytes:
        if shard >= 0:
            return os.pread(self._shard(sample, shard), size, offset)
        with open(self.split.path(sample), "rb") as file:  # noqa: PTH123 - the shorter way, for every sample
            return file.read(size + 1)  # whatever has taken its place may be without end

    def read(self, sample: int) -> np.ndarray:
        """The sample's bytes, uint8 [size].

        Raises UnreadableSample where they are missing or not those that were indexed, and TransientError where the data
        root itself is gone. Errors that pass (a network file system's) are tried again for some seconds.
        """
        (row,) = self._rows(np.array([sample]))
        return self._checked(*row)

    def _rows(self, samples: np.ndarray) -> list[tuple[int, int, int, int, int]]:
        """(sample, shard, offset, size, digest) of each: the index is asked once for all, not a field at a time."""
        records = self.split.records[samples]
        fields = (records[name].tolist() for name in ("shard", "offset", "size", "digest"))
        return list(zip(samples.tolist(), *fields, strict=True))

    def _checked(self, sample: int, shard: int, offset: int, size: int, digest: int) -> np.ndarray:
        for wait in (*_RETRY_AFTER_S, None):
            try:
                self._busy[threading.get_ident()] = time.monotonic(), sample
                data = self._read(sample, shard, offset, size)
                break
            except (OSError, ValueError) as error:
                if getattr(error, "errno", None) in _OURS:
                    raise
                if not self.split.root.is_dir():
                    raise TransientError(f"data root {self.split.root} is gone: {error}") from error
                if wait is None or getattr(error, "errno", None) not in _PASSING:
                    raise UnreadableSample(sample, str(error)) from error
                time.sleep(wait)
            finally:
                self._busy.pop(threading.get_ident(), None)
        if len(data) != size:
            raise UnreadableSample(sample, f"has {len(data)} bytes, {size} when it was indexed")
        if xxhash.xxh3_64_intdigest(data) != digest:
            raise UnreadableSample(sample, "its bytes have changed since it was indexed")
        return np.frombuffer(data, np.uint8)

    def _read_part(self, rows: list[tuple]) -> list[np.ndarray | UnreadableSample]:
        parts = []
        for row in rows:
            try:
                parts.append(self._checked(*row))
            except UnreadableSample as error:
                parts.append(error)
        return parts

    def read_batch(self, samples: np.ndarray) -> list[np.ndarray | UnreadableSample]:
        """The bytes of each sample, read by several threads; an unreadable one gives its exception in its place."""
        rows = self._rows(samples)
        size = max(1, -(-len(rows) // self.threads))
        parts = self.pool.map(self._read_part, (rows[i : i + size] for i in range(0, len(rows), size)))
        return [item for part in parts for item in part]

    def slowest(self) -> str:
        """The file whose reading lasts longest at this moment, for messages; empty if none is being read."""
        since, sample = min(list(self._busy.values()), default=(0.0, -1))
        return "" if sample < 0 else f"reading {self.split.path(sample)} for {time.monotonic() - since:.0f} s"

    def describe(self, sample: int) -> str:
        """Where the sample lies, for messages."""
        name = self.split.name(sample)
        shard = int(self.split.records["shard"][sample])
        return name if shard < 0 else f"{self.split.shards[shard]}:{name}"

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        for descriptor in self._shards.values():
            os.close(descriptor)
        self._shards.clear()
