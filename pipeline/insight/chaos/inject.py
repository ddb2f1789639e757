"""Injects faults into a job, one after another, and starts it again after each that ends it."""

import time
from dataclasses import asdict

from pipeline.errors import TransientError
from pipeline.insight.chaos.faults import Fault, Trigger, descendants, inject
from pipeline.insight.chaos.job import POLL_S, TIMEOUT_S, Job
from pipeline.progress import Progress
from pipeline.tracking.ledger_rows import is_start


class FaultInjector:
    """Runs `job` to its end while faults are injected.

    Args:
        job: not started yet.
        evaluations: steps after which the run evaluates.
        faults: in the order in which they are injected.
        progress: counts the faults.

    Attributes:
        injected: the faults so far, as plain values, each with the step at which it came.
        lost_steps: steps done twice, for each fault that ended the job.
        recovery_s: seconds from such a fault to the first new training row.
    """

    def __init__(self, job: Job, evaluations: set[int], faults: list[Fault], progress: Progress):
        self.job, self.evaluations, self.progress = job, evaluations, progress
        self.injected: list[dict] = []
        self.lost_steps: list[int] = []
        self.recovery_s: list[float] = []
        self._pending = list(reversed(faults))
        self._fault_time: float | None = None  # of the fault that the job recovers from (time.time)
        self._fault_step = 0

    def run(self) -> None:
        """Until the run has finished. Raises TransientError where the job ends or hangs without a fault."""
        self.job.start()
        trigger, progressed, before = self._next_trigger(), time.monotonic(), (-1, -1)
        while True:
            now = (len(self.job.rows("event")), self.job.last_step())
            if now != before:
                progressed = time.monotonic()
                self._record_recovery(now[1])
                before = now
            if self.job.has_ended():
                code = self.job.process.returncode
                if code == 0 and self.job.has_finished():
                    return
                raise TransientError(f"a job ended without a fault, with exit code {code}; see {self.job.log}")
            if time.monotonic() > progressed + TIMEOUT_S:
                raise TransientError(f"no step within {TIMEOUT_S:.0f} s; see {self.job.log}")
            if trigger is not None and trigger.is_due():
                self._inject(trigger.fault)
                trigger, progressed = self._next_trigger(), time.monotonic()
            time.sleep(POLL_S)

    def _is_evaluating(self) -> bool:
        step = self.job.last_step()
        return step in self.evaluations and all(row["step"] != step for row in self.job.rows("eval"))

    def _next_trigger(self) -> Trigger | None:
        if not self._pending:
            return None
        return Trigger(self._pending.pop(), self.job.run, self.job.last_step, self._is_evaluating)

    def _inject(self, fault: Fault) -> None:
        """One fault; if it ended the job, the job is started again."""
        step = self.job.last_step()
        self.job.children = descendants(self.job.process.pid)
        begun = time.time()
        if inject(self.job.process.pid, fault):
            self.job.wait_for_all()
            if not self.job.has_finished():
                self._fault_time, self._fault_step = begun, self.job.last_step()
            self.job.start()
        self.injected.append({"step": step, **asdict(fault)})
        self.progress.advance()

    def _record_recovery(self, step: int) -> None:
        """The first training row after a start ends a recovery."""
        if self._fault_time is None:
            return
        starts = [row for row in self.job.rows("event") if is_start(row)]
        if starts and starts[-1]["time"] > self._fault_time and step > starts[-1]["step"]:
            self.recovery_s.append(time.time() - self._fault_time)
            self.lost_steps.append(max(0, self._fault_step - starts[-1]["step"]))
            self._fault_time = None
