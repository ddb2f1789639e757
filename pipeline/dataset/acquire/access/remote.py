"""A file behind HTTP, read by byte ranges: reconnects, waits, requests a new address, and never mixes two versions.

A stream either delivers every byte of its range from one version of the file, or raises. It knows nothing of Kaggle:
`sign` is any function that returns an address.
"""

import io
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError as Urllib3Error

from pipeline.dataset.acquire.access.backoff import Backoff, Patience, parse_retry_after
from pipeline.dataset.acquire.access.connection import PROXY_USER, explain_connection
from pipeline.dataset.disk import explain_read
from pipeline.errors import TransientError, UserError, permission_problem

BUFFER = 1 << 18
SLOWEST = 1024  #: bytes/s; a stream that is slower for `stall_s` counts as stalled
REFUSALS = 4  #: fresh addresses refused in a row before giving up
REFUSED = (400, 401, 403, 404, 410)  # what storage services answer to an address that has expired
BUSY = (408, 425, 429, 500, 502, 503, 504, 507, 509, *range(520, 531))  # 520 to 530: of proxies of sites
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class ArchiveChangedError(TransientError):
    """The file behind the address is not the one that was opened."""


class NoRangesError(UserError):
    """The server sends whole files only."""


@dataclass(frozen=True)
class Address:
    """Where the file lies now. `size` in bytes, None if the server did not say; `etag` is empty if it gave none."""

    url: str
    size: int | None
    etag: str

    @property
    def host(self) -> str:
        """The host alone: the rest of a signed address is a secret."""
        return urlsplit(self.url).hostname or "server"


class _TryAgain(Exception):
    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


class RemoteFile:
    """A file of known size behind an address that may expire. Streams may be opened from several threads."""

    def __init__(self, name: str, sign: Callable[[], Address], patience: Patience, stop: threading.Event | None = None):
        self.name, self.patience, self.stop = name, patience, stop or threading.Event()
        self._sign, self._lock, self._local = sign, threading.Lock(), threading.local()
        self._address = sign()
        self._refused = 0
        self.etag, self.size = self._address.etag, self._address.size
        self.received = 0  #: bytes, all streams together
        if self.size is None:
            self.size = self._probe_size()

    def open(self, start: int, end: int) -> io.BufferedReader:
        """A buffered stream over bytes [start, end). Reads raise TransientError, ArchiveChangedError, NoRangesError."""
        return io.BufferedReader(_RangeReader(self, start, end), BUFFER)

    def _probe_size(self) -> int:
        backoff = Backoff(self.patience, self.stop)
        while True:
            try:
                with self.get(0, 1) as response:
                    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                break
            except _TryAgain as error:
                backoff.wait(self._address.host, str(error), error.wait_s)
        if not match or match[3] == "*":
            raise NoRangesError(f"{self._address.host} does not send the size of {self.name}; use --via zip")
        return int(match[3])

    def session(self) -> requests.Session:
        """One session a thread: connections are kept, and nothing of ~/.netrc is sent."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.auth = lambda request: request
        return self._local.session

    def get(self, start: int, end: int) -> requests.Response:
        """The response to one ranged GET, its body unread; raises _TryAgain for transient failures."""
        address = self._address
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if self.etag and not self.etag.startswith("W/"):
            headers["If-Range"] = self.etag
        timeout = (min(10.0, self.patience.stall_s), self.patience.stall_s)
        try:
            response = self.session().get(address.url, headers=headers, stream=True, timeout=timeout)
        except (requests.RequestException, Urllib3Error, OSError) as error:
            raise _TryAgain(f"can't connect ({explain_connection(error)})") from error
        try:
            self._judge(response, address, start)
        except BaseException:
            response.close()
            raise
        self._refused = 0
        return response

    def _judge(self, response: requests.Response, address: Address, start: int) -> None:
        status, headers = response.status_code, response.headers
        if status in REFUSED:
            self._renew(address, status)
            raise _TryAgain(f"the address was refused ({status})", 0.0)
        if status in BUSY:
            raise _TryAgain(f"the server answered {status}", parse_retry_after(headers.get("Retry-After")))
        if status == 407:
            raise UserError(PROXY_USER)
        changed = ArchiveChangedError(f"{address.host}: {self.name} was replaced while it was read")
        etag = headers.get("ETag", "")
        if status == 416:
            raise changed
        if status == 206:
            match = CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
            if not match or int(match[1]) != start:
                raise TransientError(f"{address.host} sent another range than asked for; use --via zip")
            _refuse_packed(address.host, headers, int(match[2]) + 1 - start)
            if (self.etag and etag and etag != self.etag) or (
                match[3] != "*" and self.size not in (None, int(match[3]))
            ):
                raise changed
        elif status == 200:
            if "html" in headers.get("Content-Type", ""):
                raise _TryAgain("a web page came instead of the archive (a login page or a proxy in between?)")
            length = headers.get("Content-Length")
            if (self.etag and etag and etag != self.etag) or (length and self.size not in (None, int(length))):
                raise changed
            raise NoRangesError(
                f"{address.host} sends no byte ranges of {self.name}; run again with --via zip "
                f"(it needs room for the archive as well: {2.04 * (self.size or 0) / 1e9:.1f} GB in all)"
            )
        else:
            raise TransientError(f"{address.host} answered {status} for {self.name}; try again later")

    def _renew(self, stale: Address, status: int) -> None:
        with self._lock:
            if self._address is not stale:
                return  # another stream has renewed it
            self._refused += 1
            if self._refused >= REFUSALS:
                raise TransientError(f"{stale.host} refuses freshly signed addresses ({status}); try again later")
            fresh = self._sign()
            if fresh.size not in (None, self.size) or (fresh.etag and self.etag and fresh.etag != self.etag):
                raise ArchiveChangedError(f"{fresh.host}: {self.name} was replaced while it was read")
            self._address = fresh


def _refuse_packed(host: str, headers: Mapping[str, str], size: int) -> None:
    """UserError where a range of `size` bytes was packed on its way. A header alone that says so does no harm."""
    how, length = headers.get("Content-Encoding", "identity"), headers.get("Content-Length")
    if how.lower() != "identity" and length != str(size):
        raise UserError(
            f"{host}: the archive comes packed once more ({how}), as by a proxy in between; use a connection without it"
        )


class _RangeReader(io.RawIOBase):
    """Bytes [position, end) of a RemoteFile; resumes where a connection broke."""

    def __init__(self, remote: RemoteFile, start: int, end: int):
        self.remote, self.position, self.end = remote, start, end
        self.response: requests.Response | None = None
        self.backoff = Backoff(remote.patience, remote.stop)
        self.waited_s = self.got = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.end - self.position)
        while wanted > 0:
            try:
                data = self._read_some(wanted)
            except _TryAgain as error:
                self._drop()
                self.backoff.wait(self.remote._address.host, str(error), error.wait_s)
                continue
            buffer[: len(data)] = data
            self.position += len(data)
            self.remote.received += len(data)
            self.backoff.progressed()
            if self.position == self.end:
                self._finish()
            return len(data)
        return 0

    def _read_some(self, wanted: int) -> bytes:
        if self.response is None:
            self.response = self.remote.get(self.position, self.end)
            self.waited_s = self.got = 0
        begin = time.monotonic()
        try:
            data = self.response.raw.read1(wanted)
        except (Urllib3Error, OSError) as error:
            raise _TryAgain(f"the connection broke ({type(error).__name__})") from error
        if not data:
            raise _TryAgain("the connection was cut")
        self.waited_s += time.monotonic() - begin
        self.got += len(data)
        if self.waited_s > self.remote.patience.stall_s:
            slow = self.got < SLOWEST * self.waited_s
            self.waited_s = self.got = 0
            if slow:
                self._drop()
        return data

    def _finish(self) -> None:
        """The range is read: let the connection go back to the pool."""
        if self.response is not None:
            self.response.raw.drain_conn()
            self._drop()

    def _drop(self) -> None:
        if self.response is not None:
            self.response.close()
            self.response = None

    def close(self) -> None:
        self._drop()
        super().close()


class LocalFile:
    """The same, for a local file."""

    def __init__(self, path: Path):
        self.path, self.name = path, str(path)
        self.received = 0
        try:
            with path.open("rb"):
                self.size = path.stat().st_size
        except PermissionError as error:
            raise permission_problem(error) from error
        except OSError as error:
            raise UserError(f"archive {path} can't be read ({error.strerror}); give a zip or a tar.gz") from error

    def open(self, start: int, end: int) -> io.BufferedReader:
        return io.BufferedReader(_LocalRange(self, start, end), BUFFER)


class _LocalRange(io.RawIOBase):
    def __init__(self, source: LocalFile, start: int, end: int):
        self.source, self.left = source, end - start
        try:
            self.file = source.path.open("rb", buffering=0)
        except OSError as error:
            raise explain_read(error, source.path) from error
        self.file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            with memoryview(buffer) as view:
                count = self.file.readinto(view[: min(len(view), self.left)])
        except OSError as error:  # not of the file that is being written
            raise explain_read(error, self.source.path) from error
        self.left -= count
        self.source.received += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
