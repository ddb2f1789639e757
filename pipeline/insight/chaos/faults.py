"""Real faults for a running training job: which there are, when they strike, and how a job's processes are found."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.run_paths import RunPaths

WAYS = ("kill a rank", "kill torchrun", "kill all", "terminate", "suspend a rank")
PHASES = ("start-up", "training", "saving", "renaming", "pruning", "evaluating")

LATEST = 15  # steps after the fault before it; each phase comes up within 12


@dataclass(frozen=True)
class Disturbance:
    """One fault. `delay`: seconds into the phase (start-up, renaming, pruning); `rows`: training rows to wait for;
    `pause_s`: how long a suspended rank sleeps; `rank`: share of the ranks, 0 to 1."""

    way: str
    phase: str
    delay: float
    rows: int
    pause_s: float
    rank: float


def draw(generator: random.Random, count: int, start_s: float) -> list[Disturbance]:
    """`count` disturbances; every way and every phase comes up equally often, in random order and at random moments.
    start_s: how long a start takes."""
    ways = [WAYS[i % len(WAYS)] for i in range(count)]
    phases = [PHASES[i % len(PHASES)] for i in range(count)]
    generator.shuffle(ways)
    generator.shuffle(phases)
    made = []
    for way, phase in zip(ways, phases, strict=True):
        span = start_s if phase == "start-up" else 0.02 if phase in ("renaming", "pruning") else 0.0
        made.append(
            Disturbance(
                way,
                phase,
                generator.uniform(0, span),
                generator.randint(1, 5),
                generator.uniform(0.2, 3),
                generator.random(),
            )
        )
    return made


def descendants(pid: int) -> list[int]:
    """The process ids below `pid`, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = sorted(children.get(waiting.pop(0), []))
        found += below
        waiting += below
    return found


def ranks(launcher: int) -> list[int]:
    """The training processes below torchrun, by their command."""
    found = []
    for pid in descendants(launcher):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in command and b"torch.distributed.run" not in command:
            found.append(pid)
    return found


def send(pid: int, number: int) -> None:
    """A signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def strike(launcher: int, what: Disturbance) -> bool:
    """Let the fault happen. True if it is one that ends the job."""
    below = ranks(launcher)
    victim = below[int(what.rank * len(below))] if below else launcher
    if what.way == "suspend a rank":
        send(victim, signal.SIGSTOP)
        time.sleep(what.pause_s)  # this is the fault itself
        send(victim, signal.SIGCONT)
        return False
    if what.way == "terminate":
        send(launcher, signal.SIGTERM)
    elif what.way == "kill a rank":
        send(victim, signal.SIGKILL)
    elif what.way == "kill torchrun":
        send(launcher, signal.SIGKILL)
    else:
        for pid in [launcher, *descendants(launcher)]:
            send(pid, signal.SIGKILL)
    return True


class Moment:
    """When a disturbance is due, judged from the run folder alone.

    Args:
        what: the disturbance.
        run: the run folder.
        last_step: () -> the step of the ledger's last training row; 0 without any.
        evaluates: () -> is an evaluation under way?
    """

    def __init__(self, what: Disturbance, run: Path, last_step: Callable[[], int], evaluates: Callable[[], bool]):
        self.what, self.checkpoints = what, RunPaths(run).checkpoints
        self.last_step, self.evaluates = last_step, evaluates
        self.begun, self.first = time.monotonic(), None
        self.known = self._saved()
        self.reached: float | None = None
        self.latest = last_step() + LATEST

    def _saved(self) -> set[str]:
        return {path.name for path in self.checkpoints.glob("step-*")}

    def _in_phase(self) -> bool:
        phase = self.what.phase
        if phase == "start-up":
            return True
        if phase == "training":
            if self.first is None:
                self.first = self.last_step()
            return self.last_step() >= self.first + self.what.rows
        if phase == "saving":
            return any(not path.name.endswith(".old.tmp") for path in self.checkpoints.glob(".step-*.tmp"))
        if phase == "evaluating":
            return self.evaluates()
        new = self._saved() - self.known
        if phase == "renaming":
            return bool(new) or any(self.checkpoints.glob(".step-*.tmp/meta.json"))
        return bool(new) or any(self.checkpoints.glob(".step-*.old.tmp"))

    def is_due(self) -> bool:
        """Has the phase been reached, and the delay passed? Or has it been missed (a start-up quicker than thought)?"""
        if self.last_step() >= self.latest:
            self.what = replace(self.what, phase="training")
            return True
        if self.reached is None and self._in_phase():
            self.reached = self.begun if self.what.phase == "start-up" else time.monotonic()
        return self.reached is not None and time.monotonic() >= self.reached + self.what.delay
