"""Interleaved benchmarks: each candidate in a process of its own, one round at a time, all others idle.

Neighboring rounds see the same machine, so the ratio of two candidates is found round by round. Also the tables that
show it.
"""

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

from pipeline.errors import TransientError
from pipeline.progress import Progress

Round = tuple[float, float, float]  # CPU ms and wall ms per unit, resident memory in MiB


class Unavailable(Exception):
    """A candidate that cannot run on this machine; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """One of the things to compare.

    Attributes:
        name: in the table.
        make: an importable function; called with `arguments` in the candidate's process, it prepares and returns a
            function that runs one round and returns how many units (images, steps) it processed.
        arguments: keyword arguments of `make`.
        may_crash: a crash of its process is reported in the table, and the others continue.
    """

    name: str
    make: Callable[..., Callable[[], int]]
    arguments: dict[str, Any] = field(default_factory=dict)
    may_crash: bool = False


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of several rounds."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self, digits: int = 4) -> dict[str, float]:
        parts = {"median": self.median, "min": self.minimum, "max": self.maximum}
        return {name: round(value, digits) for name, value in parts.items()}


@dataclass(frozen=True)
class Measured:
    """What was measured of one candidate.

    Attributes:
        cpu_ms, wall_ms: milliseconds per unit, of each round in order.
        rss_mib: resident memory at the end of the first and of the last round, MiB.
        unavailable: why it did not run, or None.
    """

    cpu_ms: tuple[float, ...] = ()
    wall_ms: tuple[float, ...] = ()
    rss_mib: tuple[float, float] = (0.0, 0.0)
    unavailable: str | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.unavailable is not None:
            return {"unavailable": self.unavailable}
        cpu, wall = Spread.of(self.cpu_ms), Spread.of(self.wall_ms)
        return {"cpu_ms": cpu.as_dict(), "wall_ms": wall.as_dict(), "rss_mib": [round(mib) for mib in self.rss_mib]}


def run_interleaved(
    candidates: Sequence[Candidate], rounds: int, warm_up: int = 1, title: str = "measuring", alone: bool = False
) -> dict[str, Measured]:
    """Run `warm_up` + `rounds` rounds of every candidate, in turns.

    CPU time is that of all threads and child processes of a candidate.

    Args:
        alone: one after another instead, each with the machine (and its GPU's memory) to itself.

    Returns:
        name -> what was measured, in the order of `candidates`.

    Raises:
        TransientError: a candidate failed that has no `may_crash`.
    """
    if alone:
        each = [run_interleaved([one], rounds, warm_up, f"{title}, {one.name}") for one in candidates]
        return {name: found for one in each for name, found in one.items()}
    context = multiprocessing.get_context("spawn")
    workers: dict[str, _Worker] = {}
    measured: dict[str, Measured] = {}
    samples: dict[str, list[Round]] = {}
    try:
        for candidate in candidates:
            worker = workers[candidate.name] = _Worker(context, candidate)
            answer = worker.receive()
            if isinstance(answer, Unavailable):
                measured[candidate.name] = Measured(unavailable=str(answer))
            else:
                samples[candidate.name] = []
        with Progress(title, (rounds + warm_up) * len(samples), "rounds") as progress:
            for number in range(rounds + warm_up):
                for name in [name for name in samples if name not in measured]:
                    answer = workers[name].run_round()
                    if isinstance(answer, Unavailable):
                        measured[name] = Measured(unavailable=str(answer))
                    elif answer is not None and number >= warm_up:
                        samples[name].append(answer)
                    progress.advance(1)
    finally:
        for worker in workers.values():
            worker.close()
    for name, taken in samples.items():
        if name not in measured:
            cpu, wall, rss = zip(*taken, strict=True)
            measured[name] = Measured(cpu, wall, (rss[0], rss[-1]))
    return {candidate.name: measured[candidate.name] for candidate in candidates}


def ratios(measured: dict[str, Measured], of: str, to: str, key: str = "cpu_ms") -> Spread | None:
    """Time of `to` over time of `of`, round by round. None where one of them did not run."""
    one, other = measured[of], measured[to]
    if one.unavailable is not None or other.unavailable is not None:
        return None
    pairs = zip(getattr(other, key), getattr(one, key), strict=True)
    return Spread.of([theirs / ours for theirs, ours in pairs])


class _Worker:
    """The process of a candidate, and the connection to it."""

    def __init__(self, context: SpawnContext, candidate: Candidate):
        self.candidate = candidate
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, candidate), daemon=False)
        self.process.start()
        there.close()

    def run_round(self) -> Round | Unavailable | None:
        self.connection.send("round")
        return self.receive()

    def receive(self) -> Round | Unavailable | None:
        """The next answer: None when prepared, the measurements of a round, or why it cannot run.

        Raises:
            TransientError: it failed, without `may_crash`.
        """
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self.process.join(20)
            kind, value = "failed", f"its process ended with exit code {self.process.exitcode}"
        if kind == "unavailable" or (kind == "failed" and self.candidate.may_crash):
            return Unavailable(value)
        if kind == "failed":
            raise TransientError(f"bench: {self.candidate.name} failed: {value}")
        return value

    def close(self) -> None:
        self.connection.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.terminate()


def _serve(connection: Connection, candidate: Candidate) -> None:
    """The candidate's process: prepare, then a round for each message, until the connection is closed."""
    try:
        one_round = candidate.make(**candidate.arguments)
        connection.send(("ready", None))
    except Unavailable as error:
        connection.send(("unavailable", str(error)))
        return
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            connection.recv()
        except EOFError:
            break
        try:
            cpu, wall = cpu_seconds(), time.perf_counter()
            units = one_round()
            cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
            connection.send(("round", (1e3 * cpu / units, 1e3 * wall / units, rss_mib())))
        except Exception as error:
            traceback.print_exc()
            connection.send(("failed", f"{type(error).__name__}: {error}"))
            break
    connection.close()
    os._exit(0)  # do not wait for the worker processes and threads of a candidate


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and its living child processes."""
    own = time.process_time()
    ticks = os.sysconf("SC_CLK_TCK")
    for child in _children():
        try:
            fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        own += (int(fields[11]) + int(fields[12])) / ticks
    return own


def _children() -> list[int]:
    found: list[int] = []
    for path in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (path / "children").read_text(encoding="utf-8").split())
        except OSError:
            continue
    return found


def rss_mib() -> float:
    """Resident memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def spread_table(measured: dict[str, Measured], key: str) -> str:
    """A row for each candidate: median, minimum, maximum."""
    rows = {}
    for name, one in measured.items():
        if one.unavailable is not None:
            rows[name] = f"unavailable: {one.unavailable}"
        else:
            spread = Spread.of(getattr(one, key))
            rows[name] = f"{spread.median:9.3f}   {spread.minimum:9.3f} {spread.maximum:9.3f}"
    return format_rows(rows)


def ratio_line(one: str, other: str, spread: Spread) -> str:
    return f"  {spread.median:6.2f} x  {one} / {other}   ({spread.minimum:.2f} to {spread.maximum:.2f})"


def format_rows(rows: dict[str, str]) -> str:
    """A line for each name and its text, aligned."""
    width = max(map(len, rows))
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())
