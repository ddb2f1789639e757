"""Checks of the time that a run takes, and of what is to happen in it."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config
from pipeline.config.time import steps_of
from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.insight.preflight.check_result import FAIL, PASS, WARN, CheckResult
from pipeline.insight.status.run_state import median_step_s, newest_checkpoint, read_events_and_evals, read_tail
from pipeline.progress import duration
from pipeline.run_paths import RunPaths
from pipeline.tracking.ledger_rows import is_start


def check_schedule(config: Config, data: dict) -> Iterator[CheckResult]:
    """Nothing, unless the learning rates of this length can't be worked out or are probably not what is meant."""
    from pipeline.training.optim.lr_schedule import Schedule, peak_lr

    if not data.get("images"):
        return
    batch = config.train.global_batch_size
    try:
        schedule = Schedule(config.schedule, peak_lr(config.optim, batch), data["images"]["train"] / batch)
    except UserError as error:
        yield CheckResult(FAIL, "schedule", str(error))
        return
    if schedule.milestone_warning:
        yield CheckResult(WARN, "schedule", schedule.milestone_warning)


def check_signal_lead(limit_s: float, lead_s: float) -> CheckResult:
    """The time limit is not longer than the time by which the signal comes before it, so that it comes at once."""
    return CheckResult(
        WARN,
        "signal",
        f"a time limit of {duration(limit_s)} is not longer than the {lead_s:.0f} s by which Slurm's signal comes "
        "before it; give a longer --time",
    )


def check_time(
    run_dir: Path | None,
    config: Config,
    world_size: int,
    data: dict,
    limit_s: float | None,
    bench: tuple[float, int] | None = None,
) -> CheckResult:
    """How often will the time limit interrupt the run? Steps left times the seconds of the ledger's last steps, or of
    `bench`: images/s by so many processes together."""
    if not data.get("images"):
        return CheckResult(WARN, "time", "unknown without an index")
    total = round(steps_of(config.schedule.epochs, data["images"]["train"] / config.train.global_batch_size))
    total = min(max(1, total), config.train.max_steps or total)
    checkpoint = newest_checkpoint(run_dir) if run_dir else None
    left = max(0, total - (checkpoint[0] if checkpoint else 0))
    ledger = RunPaths(run_dir).ledger if run_dir else None
    rows = read_tail(ledger) if ledger and ledger.exists() else []
    step_s = median_step_s(rows, config.train.global_batch_size)
    limit = f"a time limit of {duration(limit_s)}" if limit_s else "no time limit"
    measured_on, source = world_size, ""
    if ledger is not None and step_s is not None:
        starts = [row for row in read_events_and_evals(ledger) if is_start(row)]
        measured_on = starts[-1].get("world_size", world_size) if starts else world_size
    elif bench is not None:
        images_per_s, measured_on = bench
        step_s, source = config.train.global_batch_size / images_per_s, " (from --bench)"
    else:
        unknown = "the time of a step is known once some are done, or from --bench"
        return CheckResult(PASS, "time", f"{count(left, 'step')}; {unknown}; {limit}")
    step_s *= measured_on / world_size  # a larger world shares the same batch
    text = f"{count(left, 'step')} of {step_s:.3g} s{source}: {duration(left * step_s)}"
    if measured_on != world_size:
        text += f" (at the speed of {measured_on} process{'es' if measured_on > 1 else ''})"
    if limit_s is None or left * step_s < limit_s:
        return CheckResult(PASS, "time", f"{text}, {limit}")
    times = int(-(-left * step_s // limit_s))
    return CheckResult(PASS, "time", f"{text}, {limit}: {times} starts, with requeues in between")
