"""The groups `guard`, `checkpoint` and `tracking`: how a run is watched over, saved and reported."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Check, at_least_zero, positive, runtime_field


@dataclass(frozen=True)
class GuardConfig:
    """What to do about losses and gradients that are not finite, and about other anomalies."""

    nonfinite: Literal["skip", "stop"] = runtime_field("skip")
    """A loss or gradient that is NaN or infinite: skip that step's update, on every rank; or stop."""
    max_skipped: int = runtime_field(5)
    """Such steps in a row after which the run goes back to the last checkpoint before them."""
    max_rollbacks: int = runtime_field(2)
    """Times that a run goes back; at the next it stops."""
    rollback_lr_factor: float = runtime_field(0.5)
    """The learning rate is multiplied by this from the step on that the run went back to."""
    rollback_reshuffle: bool = runtime_field(False)
    """Draw the rest of that epoch in another order."""
    spike_factor: float = runtime_field(2.0)
    """A loss above this times the median of the last 100, and far outside their spread, is marked in the ledger."""
    compare_every_steps: int = runtime_field(1000)
    """Compare the parameters of all ranks whenever this many steps are done, and before each checkpoint."""


def check_guard(c: GuardConfig) -> Iterator[Check]:
    """Impossible values of the group `guard`."""
    yield positive("guard.max_skipped", c.max_skipped)
    yield at_least_zero("guard.max_rollbacks", c.max_rollbacks)
    factor = c.rollback_lr_factor
    yield "guard.rollback_lr_factor", factor, 0 < factor <= 1, "give a number above 0, at most 1"
    yield "guard.spike_factor", c.spike_factor, c.spike_factor > 1, "give a number above 1"
    yield positive("guard.compare_every_steps", c.compare_every_steps)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay."""

    every_steps: int | None = runtime_field(None)
    """Save whenever this many steps are done."""
    every_minutes: float | None = runtime_field(15.0)
    """Save when the last save is this old."""
    every_epoch: bool = runtime_field(True)
    """Save at the end of each epoch."""
    keep: int = runtime_field(2)
    """Newest checkpoints kept, beside the best one."""
    outage_timeout_minutes: float = runtime_field(30.0)
    """Training continues for this long while the run folder can't be written, with its rows kept in memory; then the
    run ends with exit code 1, to be started again, perhaps elsewhere."""


def check_checkpoint(c: CheckpointConfig) -> Iterator[Check]:
    """Impossible values of the group `checkpoint`."""
    yield positive("checkpoint.every_steps", c.every_steps, optional=True)
    yield positive("checkpoint.every_minutes", c.every_minutes, optional=True)
    yield positive("checkpoint.keep", c.keep)
    yield positive("checkpoint.outage_timeout_minutes", c.outage_timeout_minutes)


@dataclass(frozen=True)
class TrackingConfig:
    """W&B, TensorBoard, progress lines, the final report."""

    wandb: Literal["auto", "online", "offline", "disabled"] = runtime_field("auto")
    """auto: as WANDB_MODE or W&B's settings file says; else online with a key, offline without one. Of this option and
    WANDB_MODE the more private one counts. metrics.jsonl is written always."""
    project: str | None = runtime_field(None)
    """W&B project; default: WANDB_PROJECT or what W&B's settings file says, else imagenet."""
    entity: str | None = runtime_field(None)
    """W&B user or team; default: WANDB_ENTITY or what W&B's settings file says, else your own."""
    name: str | None = runtime_field(None)
    """Name of the W&B run; default: WANDB_NAME, else the run folder's name."""
    tensorboard: bool = runtime_field(False)
    """Write event files for TensorBoard into the run folder's tensorboard/; needs the package (extra [tensorboard])."""
    report: bool = runtime_field(True)
    """Write report/index.html when the run is finished, and send its pictures to W&B."""
    print_every_s: float = runtime_field(30.0)
    """Seconds between plain progress lines where the output is not a terminal that shows a bar."""


def check_tracking(c: TrackingConfig) -> Iterator[Check]:
    """Impossible values of the group `tracking`."""
    yield positive("tracking.print_every_s", c.print_every_s)
