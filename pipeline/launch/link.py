"""A launcher's connection to the coordinator: what it sends and receives. A thread keeps it alive."""

import contextlib
import json
import queue
import socket
import threading
import time

from pipeline.launch.coordinator import BEAT_S, SILENT_S

SILENCE_S = 3 * SILENT_S  # without an answer for so long a launcher counts itself as cut off


class Link:
    """A connection, from its making to `close`.

    Args:
        host, port: of the coordinator.
        hello: what this launcher is: name, ranks, node_rank; and who asked it to stop.
        timeout_s: for the connection to be made.

    Raises OSError where it can't be made.
    """

    def __init__(self, host: str, port: int, hello: dict, timeout_s: float):
        self.orders: queue.Queue[dict] = queue.Queue()  # {"do": "cut"} comes last, when the connection is lost
        self._socket = socket.create_connection((host, port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(BEAT_S)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.say("hello", **hello)
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

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self.say("beat")

    def _listen(self) -> None:
        received, last_data, looked = b"", time.monotonic(), time.monotonic()
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
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    if order["do"] != "beat":
                        self.orders.put(order)
        self._closed.set()
        self._socket.close()
        self.orders.put({"do": "cut"})
