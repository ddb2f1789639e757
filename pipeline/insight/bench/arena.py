"""Contenders that take turns: each in a process of its own, one round after another, all others asleep meanwhile."""

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import TransientError
from pipeline.progress import Progress


class Absent(Exception):
    """A contender that can't take part here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """name: in the table. make: importable by name; called with `arguments` in the contender's process, it gets ready
    and returns a function that does one round and returns how many units (images, steps) it did."""

    name: str
    make: Callable[..., Callable[[], int]]
    arguments: dict = field(default_factory=dict)
    may_crash: bool = False  # then it is absent, with its exit code, and the others go on


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of several rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def plain(self, digits: int = 4) -> dict[str, float]:
        parts = {"median": self.median, "min": self.least, "max": self.greatest}
        return {name: round(value, digits) for name, value in parts.items()}


@dataclass(frozen=True)
class Outcome:
    """cpu_ms, wall_ms: a unit, of all rounds in order. absent: why it did not take part, or None. rss_mib: at the end
    of the first and of the last round."""

    cpu_ms: tuple[float, ...] = ()
    wall_ms: tuple[float, ...] = ()
    rss_mib: tuple[float, float] = (0.0, 0.0)
    absent: str | None = None

    def plain(self) -> dict:
        if self.absent is not None:
            return {"absent": self.absent}
        cpu, wall = Spread.of(self.cpu_ms), Spread.of(self.wall_ms)
        return {"cpu_ms": cpu.plain(), "wall_ms": wall.plain(), "rss_mib": [round(value) for value in self.rss_mib]}


def compete(contenders: Sequence[Contender], rounds: int, warm_up: int = 1, about: str = "") -> dict[str, Outcome]:
    """Let the contenders take turns, `warm_up` + `rounds` rounds each; name -> outcome. CPU time is that of all threads
    and child processes of a contender. Raises TransientError where one fails."""
    context = multiprocessing.get_context("spawn")
    members: dict[str, tuple] = {}
    outcomes: dict[str, Outcome] = {}
    taken: dict[str, list[tuple[float, float, float]]] = {}
    try:
        for contender in contenders:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, contender), daemon=False)
            process.start()
            there.close()
            members[contender.name] = (process, here)
            kind, value = _ask(contender, process, here)
            if kind == "absent":
                outcomes[contender.name] = Outcome(absent=value)
            else:
                taken[contender.name] = []
        with Progress(about or "measuring", (rounds + warm_up) * len(taken), "rounds") as progress:
            for number in range(rounds + warm_up):
                for contender in contenders:
                    if contender.name in outcomes:
                        continue
                    process, here = members[contender.name]
                    here.send("round")
                    kind, value = _ask(contender, process, here)
                    if kind == "absent":
                        outcomes[contender.name] = Outcome(absent=value)
                    elif number >= warm_up:
                        taken[contender.name].append(value)
                    progress.advance(1)
    finally:
        for process, connection in members.values():
            connection.close()
            process.join(20)
            if process.is_alive():
                process.terminate()
    for name, results in taken.items():
        if name in outcomes:
            continue
        cpu, wall, rss = zip(*results, strict=True)
        outcomes[name] = Outcome(cpu, wall, (rss[0], rss[-1]))
    return {contender.name: outcomes[contender.name] for contender in contenders}


def ratios(outcomes: dict[str, Outcome], of: str, to: str, what: str = "cpu_ms") -> Spread | None:
    """How many times `of` what `to` takes, round by round (a round's neighbours saw the same machine)."""
    one, other = outcomes[of], outcomes[to]
    if one.absent is not None or other.absent is not None:
        return None
    pairs = zip(getattr(other, what), getattr(one, what), strict=True)
    return Spread.of([theirs / ours for theirs, ours in pairs])


def _ask(contender: Contender, process, connection) -> tuple[str, object]:
    """What the contender answers. Raises TransientError where it fails, unless it may."""
    try:
        kind, value = connection.recv()
    except EOFError:
        process.join(20)
        kind, value = "failed", f"its process ended with {process.exitcode}"
    if kind == "failed":
        if contender.may_crash:
            return "absent", str(value)
        raise TransientError(f"bench: {contender.name} failed: {value}")
    return kind, value


def _serve(connection, contender: Contender) -> None:
    try:
        one_round = contender.make(**contender.arguments)
        connection.send(("ready", None))
    except Absent as error:
        connection.send(("absent", str(error)))
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
    os._exit(0)  # others' worker processes and threads must not keep it


def cpu_seconds() -> float:
    """CPU time of this process, all its threads, and its living child processes."""
    own = time.process_time()
    ticks = os.sysconf("SC_CLK_TCK")
    for child in _children():
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        own += (int(fields[11]) + int(fields[12])) / ticks
    return own


def _children() -> list[int]:
    found = []
    for path in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (path / "children").read_text().split())
        except OSError:
            continue
    return found


def rss_mib() -> float:
    """Resident memory of this process, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
