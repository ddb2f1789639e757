"""Members of a zip by byte ranges, in parallel streams: each checked in size and CRC-32 before it gets its place.

Neighbours in the archive share one request, so a million members cost some thousand round trips; a stream holds one
member's bytes at a time.
"""

import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO, Protocol

import numpy as np

from pipeline.dataset.acquire.journal import Journal
from pipeline.dataset.acquire.zip_directory import DEFLATED, LOCAL_HEADER, Directory, Source
from pipeline.errors import TransientError
from pipeline.progress import Progress

CHUNK = 4 << 20
GAP = 16 << 10  # bytes of unwanted members that are read through rather than asked around
TRIES = 3  # of a member that arrives damaged
BARRIER_EVERY_S = 60.0


class MemberDamagedError(Exception):
    """A member's bytes are not what the archive's directory says."""


class Writer(Protocol):
    """Where members go."""

    def write(self, stream: int, number: int, name: str, chunks: Iterator[bytes]) -> int:
        """Write one member, all or nothing."""


def plan_requests(directory: Directory, missing: np.ndarray, whole: np.ndarray, most: int) -> list[np.ndarray]:
    """Group the members `missing` into requests: arrays of member numbers in the order of their bytes.

    Args:
        missing: member numbers, [n].
        whole: member numbers, [m]: no request covers the bytes of these.
        most: bytes a request, unless a single member has more.
    """
    entries = directory.entries
    missing = missing[np.argsort(entries["start"][missing], kind="stable")]
    if not len(missing):
        return []
    starts, ends = (entries[key][missing].astype(np.int64) for key in ("start", "end"))
    done = np.sort(entries["start"][whole].astype(np.int64))
    done_before = np.searchsorted(done, starts)
    apart = (starts[1:] - ends[:-1] > GAP) | (np.diff(done_before) > 0)
    stops = np.append(np.flatnonzero(apart) + 1, len(missing))
    requests, first = [], 0
    for stop in stops:
        while first < stop:
            last = max(first + 1, int(np.searchsorted(ends[:stop], starts[first] + most, "right")))
            requests.append(missing[first:last])
            first = last
    return requests


class Reader:
    """A stream that knows its place in the archive."""

    def __init__(self, stream: BinaryIO, position: int):
        self.stream, self.position = stream, position

    def read(self, count: int) -> bytes:
        data = self.stream.read(count)
        self.position += len(data)
        if len(data) != count:
            raise MemberDamagedError("the archive ends early")
        return data

    def skip_to(self, position: int) -> None:
        while self.position < position:
            self.read(min(CHUNK, position - self.position))


def unpack(reader: Reader, directory: Directory, number: int) -> Iterator[bytes]:
    """The bytes of a member in chunks; MemberDamagedError after the last one where size or CRC-32 disagree."""
    entry = directory.entries[number]
    packed, size, method = int(entry["packed"]), int(entry["size"]), int(entry["method"])
    reader.skip_to(int(entry["start"]))
    header = LOCAL_HEADER.unpack(reader.read(LOCAL_HEADER.size))
    name_length, extra_length = header[-2:]
    if header[0] != b"PK\3\4" or reader.read(name_length) != directory.raw_name(number):
        raise MemberDamagedError("its header is not where the directory says")
    reader.read(extra_length)
    if reader.position + packed > int(entry["end"]):
        raise MemberDamagedError("it overlaps the next one")
    chunks = _inflate(reader, packed, size) if method == DEFLATED else _copy(reader, packed)
    crc, left = 0, size
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
        yield chunk
    if left or crc != int(entry["crc"]):
        raise MemberDamagedError("its size is wrong" if left else "its CRC-32 is wrong")


def _copy(reader: Reader, left: int) -> Iterator[bytes]:
    while left:
        chunk = reader.read(min(CHUNK, left))
        left -= len(chunk)
        yield chunk


def _inflate(reader: Reader, left: int, size: int) -> Iterator[bytes]:
    """Inflate `left` packed bytes; never more than `size` and one come out."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    data = b""
    try:
        while not stream.eof:
            if not data:
                if not left:
                    break
                data = reader.read(min(CHUNK, left))
                left -= len(data)
            chunk = stream.decompress(data, min(CHUNK, size + 1))
            data = stream.unconsumed_tail
            size -= len(chunk)
            if size < 0:
                raise MemberDamagedError("it is longer than the directory says")
            if chunk:
                yield chunk
    except zlib.error as error:
        raise MemberDamagedError("it does not inflate") from error
    if left or stream.unused_data or not stream.eof:
        raise MemberDamagedError("its packed size is wrong")


class Transfer:
    """One run over `requests`. `damaged`, after `run`: names of members that came wrong three times."""

    def __init__(self, source: Source, directory: Directory, writer: Writer, journal: Journal, stop: threading.Event):
        self.source, self.directory, self.writer, self.journal, self.stop = source, directory, writer, journal, stop
        self.damaged: list[tuple[str, str]] = []
        self._error: BaseException | None = None

    def run(self, requests: list[np.ndarray], streams: int, title: str, quiet: bool = False) -> None:
        """Fetch every member of `requests`; raises what stopped it (UserError, TransientError)."""
        if not requests:
            return
        packed = self.directory.entries["packed"]
        total = int(sum(packed[numbers].sum() for numbers in requests))
        todo = deque(requests)
        streams = min(streams, len(requests))
        self._counts = [0] * streams
        threads = [threading.Thread(target=self._work, args=(i, todo), daemon=True) for i in range(streams)]
        barrier_at = time.monotonic() + BARRIER_EVERY_S
        with Progress(title, total, "bytes", quiet=quiet) as progress:
            for thread in threads:
                thread.start()
            try:
                while any(thread.is_alive() for thread in threads):
                    self.stop.wait(0.05)
                    progress.advance(sum(self._counts) - progress.count)
                    if time.monotonic() > barrier_at:
                        self.journal.barrier()
                        barrier_at = time.monotonic() + BARRIER_EVERY_S
                    if self.stop.is_set():
                        break
            except BaseException:
                self.stop.set()
                raise
            deadline = time.monotonic() + 2.0  # a thread that hangs on a dead line is left behind
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            if self._error is not None:
                raise self._error
            progress.advance(sum(self._counts) - progress.count)
        self.journal.barrier()

    def _work(self, stream: int, todo: deque) -> None:
        try:
            while not self.stop.is_set():
                try:
                    numbers = todo.popleft()
                except IndexError:
                    return
                self._fetch_run(stream, numbers)
        except BaseException as error:  # passed to the thread that waits
            if self._error is None and not self.stop.is_set():
                self._error = error
            self.stop.set()

    def _fetch_run(self, stream: int, numbers: np.ndarray) -> None:
        entries = self.directory.entries
        start, end = int(entries["start"][numbers[0]]), int(entries["end"][numbers[-1]])
        with self.source.open(start, end) as file:
            reader = Reader(file, start)
            for number in numbers.tolist():
                if self.stop.is_set():
                    return
                self._fetch(stream, reader, number)
                self._counts[stream] += int(entries["packed"][number])

    def _fetch(self, stream: int, reader: Reader, number: int) -> None:
        name = self.directory.name(number)
        try:
            self.writer.write(stream, number, name, self._unpack(reader, number))
        except MemberDamagedError:
            if not self._fetch_again(stream, name, number):
                return
        self.journal.add(number)

    def _unpack(self, reader: Reader, number: int) -> Iterator[bytes]:
        """`unpack`, unless this run was stopped: a stream left behind must not write any more."""
        yield from unpack(reader, self.directory, number)
        if self.stop.is_set():
            raise TransientError("stopped")

    def _fetch_again(self, stream: int, name: str, number: int) -> bool:
        """A member that arrived damaged, alone and from the start, which shows whether line or archive is bad."""
        start, end = (int(self.directory.entries[key][number]) for key in ("start", "end"))
        reason = ""
        for _ in range(TRIES - 1):
            with self.source.open(start, end) as file:
                try:
                    self.writer.write(stream, number, name, self._unpack(Reader(file, start), number))
                    return True
                except MemberDamagedError as error:
                    reason = str(error)
        self.damaged.append((name, reason))
        return False
