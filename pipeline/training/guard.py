"""NaN and infinite values: their updates are skipped, then the run rolls back, then it stops. Loss spikes are marked.

A run remains a function of its step: each rollback is kept, in the ledger and in checkpoints, as (at, to, lr_factor,
reshuffle), and the learning rate and the order of samples from step `to` on follow from that list.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from pipeline.config import GuardConfig
from pipeline.errors import TransientError

if TYPE_CHECKING:  # it imports torch, and `audit` reads rollbacks without
    from pipeline.training.ranks.step_stats import StepStats

WINDOW, ENOUGH = 100, 20  # losses that a spike is judged by, and the fewest that suffice
INHERITED = "inherited_rollbacks"  # in the ledger's row of a start
SPREADS = 5  # a spike is also so many standard deviations above, estimated by the median absolute deviation


@dataclass(frozen=True)
class Rollback:
    """After `at` steps the run rolled back to step `to`, and resumed with another learning rate or order."""

    at: int
    to: int
    lr_factor: float
    reshuffle: bool


def rollbacks_of(meta: dict) -> list[Rollback]:
    """The rollbacks that a checkpoint's manifest lists."""
    return [Rollback(*item) for item in meta.get("rollbacks", [])]


def rollbacks_of_ledger(rows: Iterable[dict]) -> list[Rollback]:
    """The rollbacks among a ledger's rows, after those of the run whose checkpoint this one began with."""
    inherited: list[Rollback] = []
    own: list[Rollback] = []
    for row in rows:
        if row.get("event") == "rolled_back":
            own.append(Rollback(row["at"], row["to"], row["lr_factor"], row["reshuffle"]))
        elif row.get(INHERITED):
            inherited += rollbacks_of({"rollbacks": row[INHERITED]})
    return inherited + own


def inherited_rollbacks(meta: dict, rollbacks: Sequence[Rollback]) -> list[Rollback]:
    """The rollbacks of a checkpoint (its manifest) that a run's ledger, with these rollbacks, does not have: those of
    another run, which come before its own."""
    return list((Counter(rollbacks_of(meta)) - Counter(rollbacks)).elements())


def is_in_history(meta: dict, rollbacks: Sequence[Rollback]) -> bool:
    """Was a checkpoint (its manifest) saved by a run with these rollbacks, not in steps that one of them undid?"""
    known = rollbacks_of(meta)
    return all(rollback in known for rollback in rollbacks if rollback.to < meta["step"])


class Guard:
    """What the losses and gradients of the steps so far mean for the run. The same on all ranks.

    Attributes:
        rollbacks: of the run so far.
        last_good_step: number of steps done before the first of the bad steps in a row; None: the last step was good.
        tripped: the same value once there were too many bad steps in a row; None before.

    Args:
        config: the policy.
        precision: of the run; fp16 skips single updates while it searches for its loss scale.
    """

    def __init__(self, config: GuardConfig, precision: str):
        self.config, self.precision = config, precision
        self.rollbacks: list[Rollback] = []
        self.last_good_step: int | None = None
        self.tripped: int | None = None

    def restore(self, rollbacks: list[Rollback], last_good_step: int | None, step: int) -> None:
        """Take the state that belongs to a checkpoint of this step. It may have been saved after the last bad step that
        is allowed, when the run was asked to stop."""
        self.rollbacks, self.last_good_step, self.tripped = list(rollbacks), last_good_step, None
        if last_good_step is not None and step - last_good_step >= self.config.max_skipped:
            self.tripped = last_good_step

    def observe(self, stats: "StepStats") -> str | None:
        """Judge a step. Returns a warning at the first of several bad steps.

        Raises TransientError where the policy is to stop, or allows no further rollback.
        """
        if not self._is_bad(stats):
            self.last_good_step = None
            return None
        is_first = self.last_good_step is None
        if self.last_good_step is None:
            self.last_good_step = stats.step - 1
        if self.config.nonfinite == "stop":
            raise TransientError(f"{_describe(stats)}; nothing was saved since. {self._remedy()}", on_all_ranks=True)
        if stats.step - self.last_good_step >= self.config.max_skipped and self.tripped is None:
            self.tripped = self.last_good_step
            if len(self.rollbacks) >= self.config.max_rollbacks:
                raise TransientError(
                    f"{_describe(stats)}, as in all steps after step {self.last_good_step}; rollbacks so far: "
                    f"{len(self.rollbacks)} of {self.config.max_rollbacks}. {self._remedy()}",
                    on_all_ranks=True,
                )
        return f"{_describe(stats)}: update skipped" if is_first else None

    def _is_bad(self, stats: "StepStats") -> bool:
        if math.isfinite(stats.loss) and math.isfinite(stats.grad_norm):
            return False
        searching_for_scale = self.precision == "fp16" and math.isfinite(stats.loss) and stats.scale >= 1
        return not searching_for_scale

    def _remedy(self) -> str:
        other = "or use --train.precision bf16" if self.precision == "fp16" else "or try --train.precision fp32"
        return f"Lower --optim.lr, lengthen --schedule.warmup_epochs, {other}"

    def roll_back(self, at: int, to: int) -> Rollback:
        """Add a rollback to the run's history."""
        rollback = Rollback(at, to, self.config.rollback_lr_factor, self.config.rollback_reshuffle)
        self.restore([*self.rollbacks, rollback], None, to)
        return rollback

    def failed_again(self) -> bool:
        """Did the steps fail that failed before the last rollback, or earlier ones? Then the checkpoint that was used
        for it may be bad already."""
        return bool(self.rollbacks) and self.tripped is not None and self.tripped <= self.rollbacks[-1].at

    def lr_factor(self, step: int) -> float:
        """Factor of the learning rate after `step` steps."""
        return math.prod(rollback.lr_factor for rollback in self.rollbacks if step >= rollback.to)

    def reshuffled_from(self) -> list[int]:
        """The steps from which the rest of their epoch has another order."""
        return [rollback.to for rollback in self.rollbacks if rollback.reshuffle]

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"rollbacks": [list(astuple(item)) for item in self.rollbacks], "last_good_step": self.last_good_step}


def _describe(stats: "StepStats") -> str:
    scale = f", the fp16 loss scale {stats.scale:g}" if stats.scale != 1 else ""
    return f"step {stats.step}: the loss is {stats.loss}, the gradient's norm {stats.grad_norm}{scale}"


class Spikes:
    """Is a loss far above those before it, also for how much they vary? Keeps the last `WINDOW` of them.

    Args:
        factor: a spike is above the median by this factor.
        losses: of the steps so far; entries that are no finite numbers are ignored.
    """

    def __init__(self, factor: float, losses: Iterable[object]):
        self.factor = factor
        finite = (loss for loss in losses if isinstance(loss, float | int) and math.isfinite(loss))
        self.losses: deque[float] = deque(finite, maxlen=WINDOW)

    def observe(self, loss: float) -> bool:
        """Add a step's loss; True if it is a spike."""
        if not math.isfinite(loss):
            return False
        spike = len(self.losses) >= ENOUGH and loss > self._limit()
        self.losses.append(loss)
        return spike

    def _limit(self) -> float:
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return max(self.factor * median, median + SPREADS * deviation)
