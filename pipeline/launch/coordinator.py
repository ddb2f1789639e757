"""The process that decides: a TCP server beside the store, with one open connection a node.

A connection that the kernel closes says at once that a launcher has died; one that is silent, that its machine has. The
messages are lines of JSON. `serve` runs in a thread of the launcher that hosts the store, or in a process of its own.
"""

import contextlib
import json
import selectors
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.launch.membership import Membership
from pipeline.launch.node import Limits, Node
from pipeline.redact import redact

BEAT_S = 1.0  # between two signs of life of a launcher
SILENT_S = 5.0  # a launcher without a sign of life for so long is lost: less would drop nodes of a busy machine
_TICK_S = 0.1
LONGEST = 1 << 16  # bytes of a line


def say(line: str) -> None:
    """One line to the user."""
    print(redact(f"pipeline launch: {line}"), file=sys.stderr, flush=True)


@dataclass
class _Connection:
    socket: socket.socket
    seen: float
    received: bytes = b""
    label: str = ""


def listen(port: int, backlog: int) -> socket.socket:
    """A server at all addresses of this machine, IPv4 and IPv6. Raises OSError where the port is taken."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=both)


class Coordinator:
    """Serves the launchers of one job.

    Args:
        limits: what the job allows.
        port: to listen at, at all addresses; 0: any that is free.
        open_store: makes a new store for a round, and says at which port.
        about: the job, to tell it from others: see `Options.about`.

    Raises OSError where the port is taken.
    """

    def __init__(
        self, limits: Limits, port: int, open_store: Callable[[], tuple[Any, int]], about: dict[str, str] | None = None
    ):
        self.about = about or {}
        self.server = listen(port, backlog=512)
        self.port: int = self.server.getsockname()[1]
        self.job = uuid.uuid4().hex  # rounds are counted within it
        self.membership = Membership(limits, self._send, say, time.monotonic)
        self._open_store = open_store
        self._store: tuple[int, Any, int] = (0, None, 0)  # round, store, port
        self._connections: dict[int, _Connection] = {}
        self._doomed: list[tuple[int, str]] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.server, selectors.EVENT_READ, 0)
        self._keys = 0
        self._closed = threading.Event()

    def start(self) -> None:
        """Serve in a thread of this process."""
        self._thread = threading.Thread(target=self.serve, name="coordinator", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = 15.0) -> None:
        """Wait until the other launchers know that the job has ended."""
        if self.membership.exit_code is None:
            self._closed.set()
        self._thread.join(timeout_s)

    def serve(self, linger_s: float = 10.0, stop_reason: Callable[[], str] = str) -> int:
        """Serve until the job has ended and all launchers have left, or `linger_s` later. Returns its exit code.

        stop_reason: who asked this process to have the job stopped; empty: nobody.
        """
        try:
            return self._serve(linger_s, stop_reason)
        finally:  # an error that nobody foresaw, too, must not leave launchers that wait
            self.close()

    def _serve(self, linger_s: float, stop_reason: Callable[[], str]) -> int:
        last, ended = time.monotonic(), None
        while not self._closed.is_set():
            for key, _ in self._selector.select(_TICK_S):
                if key.data == 0:
                    self._accept()
                else:
                    self._receive(key.data)
            now = time.monotonic()
            if now - last > 1.0:  # this process was held up: the others may have spoken all the while
                for connection in self._connections.values():
                    connection.seen += now - last
            last = now
            self._drop_silent(now)
            if stop_reason() and not self.membership.asked_to_stop:
                self.membership.ask_to_stop(0, stop_reason())
            self.membership.tick()
            self._drop_doomed()
            if self.membership.exit_code is not None:
                ended = ended or now
                if not self._connections or now - ended > linger_s:
                    break
        return self.membership.exit_code or 0

    def close(self) -> None:
        """Close all connections."""
        self._closed.set()
        for connection in self._connections.values():
            connection.socket.close()
        self._connections.clear()
        self.server.close()

    def _accept(self) -> None:
        try:
            accepted, _ = self.server.accept()
        except OSError:  # it has gone again, or there are too many open files: the others go on
            return
        accepted.setblocking(False)
        self._keys += 1
        self._connections[self._keys] = _Connection(accepted, time.monotonic())
        self._selector.register(accepted, selectors.EVENT_READ, self._keys)

    def _receive(self, key: int) -> None:
        connection = self._connections.get(key)
        if connection is None:
            return
        try:
            data = connection.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self._doomed.append((key, f"its connection broke: {error.strerror}"))
            return
        if not data:
            self._doomed.append((key, "its launcher has ended"))
            return
        connection.seen = time.monotonic()
        *lines, connection.received = (connection.received + data).split(b"\n")
        try:
            for line in lines:
                self._process(key, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            self._doomed.append((key, "it is not a launcher of this version"))
        if len(connection.received) > LONGEST:
            self._doomed.append((key, "it is not a launcher of this version"))

    def _process(self, key: int, message: dict) -> None:
        kind = message["say"]
        if kind == "hello":
            self._connections[key].label = message["name"]
            other = [(name, mine) for name, mine in self.about.items() if message["job"].get(name, mine) != mine]
            if other:
                mine = " ".join(f"{name} {value}" for name, value in other)
                why = f"the launchers that meet there have {mine}; give the same, or another --rdzv-endpoint"
                self._send(key, {"do": "refuse", "why": why})
                return
            self._send(key, {"do": "beat"})
            if message["stop"]:
                self.membership.ask_to_stop(key, message["stop"])
            names = ("name", "ranks", "node_rank")
            self.membership.join(Node(key, **{name: message[name] for name in names}))
        elif kind == "beat":
            self._send(key, {"do": "beat"})
        elif kind == "ended":
            self.membership.report(key, message["round"], message["exit_code"], message["failure"])
        elif kind == "stop":
            self.membership.ask_to_stop(key, message["reason"])

    def _send(self, key: int, message: dict) -> None:
        connection = self._connections.get(key)
        if connection is None:
            return
        if message["do"] == "train":
            message = {**message, "store_port": self._store_of(message["round"]), "job": self.job}
        try:
            connection.socket.sendall(json.dumps(message).encode() + b"\n")  # small: its buffer always has room
        except OSError as error:
            self._doomed.append((key, f"its connection broke: {error.strerror}"))

    def _store_of(self, round_: int) -> int:
        """The port of a round's store. With a new one the last round's is gone: its ranks can't meet any more."""
        if self._store[0] != round_:
            self._store = (round_, *self._open_store())
        return self._store[2]

    def _drop_silent(self, now: float) -> None:
        for key, connection in self._connections.items():
            if now - connection.seen > SILENT_S:
                self._doomed.append((key, f"no sign of life for {SILENT_S:.0f} s"))

    def _drop_doomed(self) -> None:
        while self._doomed:
            key, how = self._doomed.pop(0)
            connection = self._connections.pop(key, None)
            if connection is not None:
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(connection.socket)
                connection.socket.close()
                self.membership.lose(key, how)
