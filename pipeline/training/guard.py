"""Numbers that are none: their updates are left out, then the run goes back, then it stops. Loss spikes are marked.

A run stays a function of its step: each time it went back is kept, in the ledger and in checkpoints, as (at, to,
lr_factor, reshuffle), and the learning rate and the order of samples from step `to` on follow from that list.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from pipeline.config import GuardConfig
from pipeline.errors import TransientError
from pipeline.training.ranks.step_stats import StepStats

WINDOW, ENOUGH = 100, 20  # losses that a spike is judged by, and the fewest that will do
SPREADS = 5  # a spike is also so many standard deviations above, estimated by the median absolute deviation


@dataclass(frozen=True)
class Rollback:
    """After `at` steps the run went back to step `to`, and from there on another way."""

    at: int
    to: int
    lr_factor: float
    reshuffle: bool


def rollbacks_of(meta: dict) -> list[Rollback]:
    """The history that a checkpoint's meta tells."""
    return [Rollback(*item) for item in meta.get("rollbacks", [])]


class Guard:
    """What the numbers of the steps so far mean for the run. The same on all ranks.

    Args:
        config: the policy.
        precision: of the run; fp16 leaves out single updates while it looks for its loss scale.
    """

    def __init__(self, config: GuardConfig, precision: str):
        self.config, self.precision = config, precision
        self.rollbacks: list[Rollback] = []
        self.bad_since: int | None = None  # the first of the bad steps in a row
        self.tripped: int | None = None  # the same once there were too many

    def note(self, report: StepStats) -> str | None:
        """Take note of a step. Returns a warning, at the first of several bad steps.

        Raises TransientError where the policy is to stop, or has no other answer left.
        """
        if not self._is_bad(report):
            self.bad_since = None
            return None
        first = self.bad_since is None
        if first:
            self.bad_since = report.step
        if self.config.nonfinite == "stop":
            raise TransientError(f"{_describe(report)}; nothing was saved since. {self._remedy()}", on_all_ranks=True)
        if report.step + 1 - self.bad_since >= self.config.max_skipped and self.tripped is None:
            self.tripped = self.bad_since
            if len(self.rollbacks) >= self.config.max_rollbacks:
                raise TransientError(
                    f"{_describe(report)}, and so since step {self.bad_since}, after going back "
                    f"{len(self.rollbacks)} times. {self._remedy()}",
                    on_all_ranks=True,
                )
        return f"{_describe(report)}: left out" if first else None

    def _is_bad(self, report: StepStats) -> bool:
        if math.isfinite(report.loss) and math.isfinite(report.grad_norm):
            return False
        looking_for_scale = self.precision == "fp16" and math.isfinite(report.loss) and report.scale >= 1
        return not looking_for_scale

    def _remedy(self) -> str:
        other = "or use --train.precision bf16" if self.precision == "fp16" else "or try --train.precision fp32"
        return f"Lower --optim.lr, lengthen --schedule.warmup_epochs, {other}"

    def go_back(self, at: int, to: int) -> Rollback:
        """Add a rollback to the run's history."""
        made = Rollback(at, to, self.config.rollback_lr_factor, self.config.rollback_reshuffle)
        self.rollbacks.append(made)
        self.bad_since = self.tripped = None
        return made

    def failed_again(self) -> bool:
        """Is the trouble at hand where the last one was, or before? Then its checkpoint may be bad already."""
        return bool(self.rollbacks) and self.tripped is not None and self.tripped <= self.rollbacks[-1].at

    def lr_factor(self, step: int) -> float:
        return math.prod(rollback.lr_factor for rollback in self.rollbacks if step >= rollback.to)

    def reshuffled_from(self) -> list[int]:
        """The steps from which the rest of their epoch has another order."""
        return [rollback.to for rollback in self.rollbacks if rollback.reshuffle]

    def belongs(self, meta: dict) -> bool:
        """Is a checkpoint part of this history, and not of a way that was given up?"""
        known = rollbacks_of(meta)
        return all(rollback in known for rollback in self.rollbacks if rollback.to < meta["step"])

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"rollbacks": [list(astuple(item)) for item in self.rollbacks], "bad_since": self.bad_since}

    def take_up(self, events: Iterable[dict]) -> None:
        """Take the history from the ledger's events."""
        rows = [row for row in events if row.get("event") == "rolled_back"]
        self.rollbacks = [Rollback(row["at"], row["to"], row["lr_factor"], row["reshuffle"]) for row in rows]


def _describe(report: StepStats) -> str:
    scale = f", the fp16 loss scale {report.scale:g}" if report.scale != 1 else ""
    return f"step {report.step + 1}: the loss is {report.loss}, the gradient's norm {report.grad_norm}{scale}"


class Spikes:
    """Is a loss far above those before it, also for how much they vary? Knows the last `WINDOW` of them."""

    def __init__(self, factor: float, losses: Iterable[float]):
        self.factor = factor
        self.losses = deque((loss for loss in losses if _is_number(loss)), maxlen=WINDOW)

    def note(self, loss: float) -> bool:
        """Take note of a step's loss; True if it is a spike."""
        if not math.isfinite(loss):
            return False
        spike = len(self.losses) >= ENOUGH and loss > self._limit()
        self.losses.append(loss)
        return spike

    def _limit(self) -> float:
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return max(self.factor * median, median + SPREADS * deviation)


def _is_number(loss) -> bool:
    return isinstance(loss, float | int) and math.isfinite(loss)
