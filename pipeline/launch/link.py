"""A launcher's connection to the coordinator: what it sends and receives. A thread keeps it alive."""

import contextlib
import json
import queue
import socket
import threading
import time

from pipeline.errors import UserError
from pipeline.launch.coordinator import BEAT_S, LONGEST, SILENT_S

SILENCE_S = 3 * SILENT_S  # without an answer for so long a launcher counts itself as cut off
_NO_COORDINATOR = "what listens there does not answer as a rendezvous of pipeline launch"


class Link:
    """A connection, from its making to `close`.

    Args:
        host, port: of the coordinator.
        hello: what this launcher is: name, ranks, node_rank, job; and who asked it to stop.
        timeout_s: for the connection to be made, and for the first answer.

    Raises OSError where there is no coordinator, and UserError where it is one of another job.
    """

    def __init__(self, host: str, port: int, hello: dict, timeout_s: float):
        self.orders: queue.Queue[dict] = queue.Queue()  # {"do": "cut"} comes last, when the connection is lost
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(BEAT_S)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.say("hello", **hello)
        try:
            self._received = self._greet(timeout_s)
        except (OSError, UserError):
            self._socket.close()
            raise
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=f"link {work.__name__}", daemon=True).start()

    def say(self, kind: str, **facts: object) -> None:
        """Send to the coordinator; a lost connection is reported by `orders`."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps({"say": kind, **facts}).encode() + b"\n")

    def close(self) -> None:
        """Leave."""
        self._closed.set()
        self._socket.close()

    def _greet(self, timeout_s: float) -> bytes:
        """Wait for the answer to the hello. Returns what came after it."""
        received, until = b"", time.monotonic() + timeout_s
        while b"\n" not in received:
            with contextlib.suppress(TimeoutError):
                data = self._socket.recv(1 << 16)
                if not data or len(received) > LONGEST:
                    raise ConnectionError(_NO_COORDINATOR)
                received += data
            if time.monotonic() > until:
                raise ConnectionError(_NO_COORDINATOR)
        first, _, received = received.partition(b"\n")
        try:
            answer = json.loads(first)
            refusal = answer["why"] if answer["do"] == "refuse" else None
        except (ValueError, KeyError, TypeError):
            raise ConnectionError(_NO_COORDINATOR) from None
        if refusal is not None:
            raise UserError(refusal)
        return received

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self.say("beat")

    def _take(self, received: bytes) -> bytes:
        """Pass on the orders that are whole. Returns the rest."""
        *lines, rest = received.split(b"\n")
        for line in lines:
            order = json.loads(line)
            if order["do"] != "beat":
                self.orders.put(order)
        return rest

    def _listen(self) -> None:
        received, last_data, looked = self._take(self._received), time.monotonic(), time.monotonic()
        while not self._closed.is_set():
            data = None
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                pass
            except OSError:
                data = b""
            now = time.monotonic()
            if data is None and now - looked > 2 * BEAT_S:  # this process was held up: an answer may be waiting
                last_data += now - looked
            looked = now
            if data == b"" or (data is None and now - last_data > SILENCE_S):
                break
            if data:
                last_data = now
                received = self._take(received + data)
        self._closed.set()
        self._socket.close()
        self.orders.put({"do": "cut"})
