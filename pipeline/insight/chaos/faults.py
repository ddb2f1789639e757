"""Faults for a running training job: their kinds, when each is injected, and how a job's processes are found."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.run_paths import RunPaths

KINDS = ("kill a rank", "kill torchrun", "kill all", "terminate", "suspend a rank")
PHASES = ("start-up", "training", "saving", "renaming", "pruning", "evaluating")

MAX_STEPS_APART = 15  # steps from one fault to the next; each phase comes up within 12


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: one of `KINDS`.
        phase: one of `PHASES`; the fault is injected in it.
        delay_s: seconds after the phase begins (start-up, renaming, pruning).
        rows: training rows to wait for (training).
        pause_s: how long a rank is suspended.
        rank: which rank, as a fraction of the world size, 0 to 1.
    """

    kind: str
    phase: str
    delay_s: float
    rows: int
    pause_s: float
    rank: float


def draw_faults(generator: random.Random, count: int, start_s: float) -> list[Fault]:
    """`count` faults; every kind and every phase is equally frequent, in random order and at random moments.

    start_s: how long a start takes, in seconds.
    """
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    phases = [PHASES[i % len(PHASES)] for i in range(count)]
    generator.shuffle(kinds)
    generator.shuffle(phases)
    made = []
    for kind, phase in zip(kinds, phases, strict=True):
        span = start_s if phase == "start-up" else 0.02 if phase in ("renaming", "pruning") else 0.0
        made.append(
            Fault(
                kind,
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
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
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


def inject(launcher: int, fault: Fault) -> bool:
    """Inject a fault. Returns True if it is one that ends the job."""
    below = ranks(launcher)
    victim = below[int(fault.rank * len(below))] if below else launcher
    if fault.kind == "suspend a rank":
        send(victim, signal.SIGSTOP)
        time.sleep(fault.pause_s)  # this is the fault itself
        send(victim, signal.SIGCONT)
        return False
    if fault.kind == "terminate":
        send(launcher, signal.SIGTERM)
    elif fault.kind == "kill a rank":
        send(victim, signal.SIGKILL)
    elif fault.kind == "kill torchrun":
        send(launcher, signal.SIGKILL)
    else:
        for pid in [launcher, *descendants(launcher)]:
            send(pid, signal.SIGKILL)
    return True


class Trigger:
    """When a fault is due, judged from the run folder alone.

    Args:
        fault: its phase is "training" in the end where the phase that was drawn did not come up.
        run: the run folder.
        last_step: () -> the step of the ledger's last training row; 0 without any.
        is_evaluating: () -> is an evaluation under way?
    """

    def __init__(self, fault: Fault, run: Path, last_step: Callable[[], int], is_evaluating: Callable[[], bool]):
        self.fault, self.checkpoints = fault, RunPaths(run).checkpoints
        self.last_step, self.is_evaluating = last_step, is_evaluating
        self.begun = time.monotonic()
        self.first: int | None = None  # the last step when the training phase began
        self.known = self._saved()
        self.reached: float | None = None
        self.deadline_step = last_step() + MAX_STEPS_APART

    def _saved(self) -> set[str]:
        return {path.name for path in self.checkpoints.glob("step-*")}

    def _in_phase(self) -> bool:
        phase = self.fault.phase
        if phase == "start-up":
            return True
        if phase == "training":
            if self.first is None:
                self.first = self.last_step()
            return self.last_step() >= self.first + self.fault.rows
        if phase == "saving":
            return any(not path.name.endswith(".old.tmp") for path in self.checkpoints.glob(".step-*.tmp"))
        if phase == "evaluating":
            return self.is_evaluating()
        new = self._saved() - self.known
        if phase == "renaming":
            return bool(new) or any(self.checkpoints.glob(".step-*.tmp/meta.json"))
        return bool(new) or any(self.checkpoints.glob(".step-*.old.tmp"))

    def is_due(self) -> bool:
        """Has the phase begun, and the delay passed? Or did it not come up (a start-up quicker than expected)?"""
        if self.last_step() >= self.deadline_step:
            self.fault = replace(self.fault, phase="training")
            return True
        if self.reached is None and self._in_phase():
            self.reached = self.begun if self.fault.phase == "start-up" else time.monotonic()
        return self.reached is not None and time.monotonic() >= self.reached + self.fault.delay_s
