"""Kaggle on loopback, for its real client: the download calls, the storage behind a signed address, and their faults.

The client is led here by `environment()`: its API host becomes http://localhost, and both that and the storage host
are reached through this server as an HTTP proxy, so any free port does.
"""

import base64
import gzip
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

STORAGE = "storage.kaggle.test"
PIECE = 8 << 10  # bytes sent between two looks at the faults
HTML = b"<html><body><h1>Please log in to the network</h1></body></html>"
USER, KEY, TOKEN = "some-user", "0123456789abcdef-the-secret-key", "KGAT_the-secret-token"
SIGNATURE = "the-secret-signature"


@dataclass
class Faults:
    """What goes wrong. Request numbers count the storage requests from 1."""

    api_statuses: list[int] = field(default_factory=list)  # of the next API calls; then they work
    api_always: int | None = None
    retry_after: str | None = None
    storage_statuses: Callable[[int], int | None] = lambda number: None
    cut: Callable[[int], bool] = lambda number: False  # close in the middle of the body
    stall: Callable[[int], bool] = lambda number: False  # hang in the middle of the body
    on_stall: Callable[[], None] = lambda: None
    drip: Callable[[int], bool] = lambda number: False  # one byte at a time, far apart
    html: Callable[[int], bool] = lambda number: False
    packed: Callable[[int], bool] = lambda number: False  # gzip, as a proxy may
    expire_after: int | None = None  # requests that one signed address serves
    ranges: bool = True
    if_range: bool = True  # is it minded?
    length: bool = True  # Content-Length
    corrupt: Callable[[bytes, int], bytes] = lambda data, offset: data  # ranges on their way
    on_request: Callable[[int], None] = lambda number: None
    on_sent: Callable[[int], None] = lambda total: None  # bytes sent so far in answer to ranges


@dataclass
class Served:
    """One storage request: the range asked for (end: exclusive), the status, the bytes of the body that were sent."""

    start: int
    end: int
    status: int
    sent: int = 0


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that are killed, or drop what they don't need, are no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class KaggleServer:
    """Serves `archive` as the competition's. Use as a context manager; `faults` may be changed at any time."""

    def __init__(
        self, archive: Path, faults: Faults | None = None, competition="imagenet-object-localization-challenge"
    ):
        self.archive, self.faults, self.competition = archive, faults or Faults(), competition
        self.etag = '"version-1"'
        self.api_calls: list[str] = []
        self.api_times: list[float] = []
        self.served: list[Served] = []
        self.problems: list[str] = []  # what no client should do
        self.total_sent = self.generation = 0
        self.uses: dict[int, int] = {}
        self.lock, self.released = threading.Lock(), threading.Event()

    def __enter__(self) -> "KaggleServer":
        self.http = _QuietServer(("127.0.0.1", 0), self._make_handler())
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()

    def environment(self, home: Path, credentials: bool = True) -> dict[str, str]:
        """Variables for a process whose Kaggle client shall come here; its home folder is `home`."""
        home.mkdir(exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("KAGGLE") and not k.lower().endswith("_proxy")}
        proxy = f"http://127.0.0.1:{self.http.server_address[1]}"
        env = {**kept, "HOME": str(home), "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": proxy}
        if credentials:
            env |= {"KAGGLE_USERNAME": USER, "KAGGLE_KEY": KEY}
        return env

    def ranges(self) -> list[Served]:
        """The requests that asked for a range and got it."""
        return [request for request in self.served if request.status == 206]

    def _make_handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server._answer_api(self, urlsplit(self.path), json.loads(body or b"{}"))

            def do_GET(self):
                parts = urlsplit(self.path)
                try:
                    if parts.hostname == STORAGE:
                        server._answer_storage(self, parts)
                    else:
                        server._reply(self, 404, b"{}")
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

        return Handler

    def _reply(self, handler, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    def _knows(self, authorization: str) -> bool:
        basic = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        return authorization in (f"Basic {basic}", f"Bearer {TOKEN}")

    def _answer_api(self, handler, parts, body: dict) -> None:
        service, _, call = parts.path.rpartition("/")
        with self.lock:
            self.api_calls.append(call)
            self.api_times.append(time.monotonic())
            status = self.faults.api_statuses.pop(0) if self.faults.api_statuses else self.faults.api_always
            self.generation += 1
            generation = self.generation
        if call == "IntrospectToken":
            answer = {"active": body.get("token") == TOKEN, "username": USER}
            return self._reply(handler, 200, json.dumps(answer).encode())
        if status is not None:
            extra = {"Retry_After": self.faults.retry_after} if self.faults.retry_after else {}
            message = {"code": status, "message": f"failed with {status} for {body}"}
            return self._reply(handler, status, json.dumps(message).encode(), **extra)
        if not self._knows(handler.headers.get("Authorization", "")):
            return self._reply(handler, 401, b'{"code": 401, "message": "Unauthenticated"}')
        if body.get("competitionName") != self.competition or not service.endswith(
            "competitions.CompetitionApiService"
        ):
            return self._reply(handler, 404, b'{"code": 404, "message": "Not found"}')
        if call == "ListDataFiles":
            files = [{"name": self.archive.name, "totalBytes": self.archive.stat().st_size}]
            return self._reply(handler, 200, json.dumps({"files": files}).encode())
        if call in ("DownloadDataFiles", "DownloadDataFile"):
            suffix = self.archive.name.rpartition(".")[2]
            address = f"http://{STORAGE}/{self.competition}.{suffix}?signature={SIGNATURE}&generation={generation}"
            return self._reply(handler, 302, b"", Location=address)
        return self._reply(handler, 404, b'{"code": 404, "message": "Not found"}')

    def _answer_storage(self, handler, parts) -> None:
        if handler.headers.get("Authorization"):
            self.problems.append("credentials were sent to the storage host")
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
        generation = int(parse_qs(parts.query)["generation"][0])
        served = Served(int(asked[1]) if asked else 0, 0, 0)
        with self.lock:
            self.served.append(served)
            number = len(self.served)
            uses = self.uses[generation] = self.uses.get(generation, 0) + 1
        self.faults.on_request(number)
        size = self.archive.stat().st_size
        served.end = min(int(asked[2]) + 1, size) if asked and asked[2] else size
        served.status = self._judge(handler, number, uses, bool(asked))
        if self.faults.html(number):
            served.status = 200
            return self._reply(handler, 200, HTML, "text/html; charset=utf-8")
        if served.status >= 400:
            extra = {"Retry_After": self.faults.retry_after} if self.faults.retry_after else {}
            return self._reply(handler, served.status, b"<Error/>", "application/xml", **extra)
        if served.status == 200:
            served.start, served.end = 0, size
        if served.status == 206 and self.faults.packed(number):
            body = gzip.compress(self.archive.read_bytes()[served.start : served.end])
            place = f"bytes {served.start}-{served.end - 1}/{size}"
            extra = {"Content_Range": place, "Content_Encoding": "gzip", "ETag": self.etag}
            return self._reply(handler, 206, body, "application/zip", **extra)
        self._send_body(handler, served, number, size)

    def _judge(self, handler, number: int, uses: int, asked: bool) -> int:
        if self.faults.expire_after is not None and uses > self.faults.expire_after:
            return 403
        if (status := self.faults.storage_statuses(number)) is not None:
            return status
        fresh = not self.faults.if_range or handler.headers.get("If-Range") in (None, self.etag)
        return 206 if asked and self.faults.ranges and fresh else 200

    def _send_body(self, handler, served: Served, number: int, size: int) -> None:
        handler.send_response(served.status)
        handler.send_header("Content-Type", "application/zip")
        handler.send_header("ETag", self.etag)
        handler.send_header("Last-Modified", "Wed, 11 Dec 2019 00:00:00 GMT")
        if self.faults.ranges:
            handler.send_header("Accept-Ranges", "bytes")
        if served.status == 206:
            handler.send_header("Content-Range", f"bytes {served.start}-{served.end - 1}/{size}")
        if self.faults.length:
            handler.send_header("Content-Length", str(served.end - served.start))
        else:
            handler.send_header("Connection", "close")
            handler.close_connection = True
        handler.end_headers()
        middle = (served.start + served.end) // 2
        with self.archive.open("rb") as file:
            position = served.start
            while position < served.end:
                file.seek(position)
                data = file.read(min(PIECE, served.end - position))
                if served.status == 206:
                    data = self.faults.corrupt(data, position)
                if position + len(data) > middle:
                    if self.faults.cut(number):
                        handler.wfile.write(data[: len(data) // 2])
                        handler.close_connection = True
                        return
                    if self.faults.stall(number):
                        self.faults.on_stall()
                        self.released.wait()
                        handler.close_connection = True
                        return
                    while self.faults.drip(number):
                        handler.wfile.write(data[:1])
                        position, data = position + 1, data[1:]
                        if self.released.wait(0.05):
                            return
                handler.wfile.write(data)
                position += len(data)
                with self.lock:
                    served.sent += len(data)
                    self.total_sent += len(data) * (served.status == 206)
                    total = self.total_sent
                self.faults.on_sent(total)
