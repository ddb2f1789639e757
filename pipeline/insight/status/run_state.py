"""The state of a run, read from its folder alone: the ledger, the markers, the checkpoints.

Does not import torch; takes milliseconds, on any machine that sees the folder, also while the run trains.
"""

import json
import math
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config.time import steps_of
from pipeline.errors import UserError
from pipeline.files import read_note
from pipeline.run_paths import META, RunPaths, list_checkpoints, not_a_run_message
from pipeline.tracking.eval_rows import left_out_note, top1_of
from pipeline.tracking.ledger_rows import is_start, parse_row, world_sizes
from pipeline.training.run_folder.lock import dead_owner

TAIL_ROWS = 100  # training rows that rates are taken over
TAIL_BYTES = 1 << 17  # holds them
QUIET_S = {"starting": 1800.0, "training": 120.0, "evaluating": 1800.0}  # silence after which a run counts as stalled
QUIET_STEPS = 20.0  # or this many times a step


@dataclass(frozen=True)
class RunState:
    """Facts about a run; None: not known (yet).

    state: starting, training, evaluating, preempted, stopped, failed, finished, stalled, imported (weights of
    `pipeline import`) or, in a list, unreadable. Percent: top1, best_top1.
    left_out: "5 of 12 images left out" of the latest evaluation, or empty. Share: data_wait_fraction. Seconds: step_s,
    left_s (training alone), checkpoint_age_s, silent_s (since the last row). world_sizes: (first step, ranks) of each
    stretch with one number of ranks.
    """

    run: str
    state: str
    detail: str
    step: int = 0
    last_step: int | None = None
    epoch: float = 0.0
    loss: float | None = None
    top1: float | None = None
    top1_step: int | None = None
    best_top1: float | None = None
    best_step: int | None = None
    left_out: str = ""
    images_per_s: float | None = None
    step_s: float | None = None
    data_wait_fraction: float | None = None
    left_s: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    silent_s: float = 0.0
    world_size: int | None = None
    world_sizes: list[tuple[int, int]] = field(default_factory=list)
    host: str | None = None
    slurm_job_id: str | None = None
    restarts: int = 0


def read_tail(path: Path) -> list[dict]:
    """The last training rows of a ledger, oldest first; at most `TAIL_ROWS`."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
        file.seek(start)
        lines = file.read().split(b"\n")[1 if start else 0 : -1]  # whole lines only
    return [row for row in map(parse_row, lines) if row and row.get("kind") == "train"][-TAIL_ROWS:]


def read_events_and_evals(path: Path) -> Iterator[dict]:
    """The rows of a ledger of kinds event and eval; takes 0.1 s for 100 MB."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start = 0
        while (start := text.find(b'{"kind": "ev', start)) >= 0:  # eval, event
            end = text.find(b"\n", start)
            if end < 0:
                return
            if (start == 0 or text[start - 1] == ord("\n")) and (row := parse_row(text[start:end])):
                yield row
            start = end


def read_marker(folder: Path, name: str) -> dict | None:
    """A marker's facts, or None where it is not there."""
    try:
        facts = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """(step, time it was written, seconds since the epoch) of the newest checkpoint folder of a run."""
    for step, path in list_checkpoints(RunPaths(folder).checkpoints):
        if (path / META).exists():
            return step, (path / META).stat().st_mtime
    return None


def median_step_s(rows: list[dict], global_batch_size: int | None) -> float | None:
    """Seconds a step, from the images/s of training rows."""
    rates = [row["images_per_s"] for row in rows if isinstance(row.get("images_per_s"), float | int)]
    if not rates or not global_batch_size or statistics.median(rates) <= 0:
        return None
    return global_batch_size / statistics.median(rates)


def read_state(folder: Path, now: float | None = None) -> RunState:
    """Read the state of a run. Raises UserError if `folder` is not a run folder."""
    now = time.time() if now is None else now
    paths, config = RunPaths(folder), _read_config(folder)
    ledger = paths.ledger
    if not ledger.exists() and config is None:
        raise UserError(not_a_run_message(folder))
    tail = read_tail(ledger) if ledger.exists() else []
    others = list(read_events_and_evals(ledger)) if ledger.exists() else []
    evals = [row for row in others if row.get("kind") == "eval"]
    events = [row for row in others if row.get("kind") == "event"]
    starts = [row for row in events if is_start(row)]
    start = starts[-1] if starts else {}
    checkpoint = newest_checkpoint(folder)
    step = max((row["step"] for row in [*tail[-1:], *evals[-1:], *starts[-1:]] if "step" in row), default=0)
    settings = config or {}
    batch = settings.get("train", {}).get("global_batch_size")
    epoch = _epoch(step, tail, evals)
    per_epoch = round(step / epoch, 6) if epoch else None
    last_step = start.get("last_step") or _last_step(settings, per_epoch)
    step_s = median_step_s(tail, batch)
    silent = max(0.0, now - max(_mtime(ledger), _mtime(paths.config)))
    activity = _activity(start, tail, evals, step, last_step, per_epoch, settings)
    state, detail = _judge(folder, activity, silent, step_s)
    best = max(evals, key=top1_of, default={})
    waits = [row["data_wait_fraction"] for row in tail if isinstance(row.get("data_wait_fraction"), float)]
    latest = evals[-1] if evals else {}
    return RunState(
        run=str(folder),
        state=state,
        detail=detail,
        step=step,
        last_step=last_step,
        epoch=epoch,
        loss=tail[-1].get("loss") if tail else None,
        top1=top1_of(latest) if latest else None,
        top1_step=latest.get("step"),
        best_top1=top1_of(best) if best else None,
        best_step=best.get("step"),
        left_out=left_out_note(latest).strip(" ()"),
        images_per_s=batch / step_s if step_s else None,
        step_s=step_s,
        data_wait_fraction=statistics.fmean(waits) if waits else None,
        left_s=(last_step - step) * step_s if step_s and last_step is not None else None,
        checkpoint_step=checkpoint[0] if checkpoint else None,
        checkpoint_age_s=max(0.0, now - checkpoint[1]) if checkpoint else None,
        silent_s=silent,
        world_size=start.get("world_size"),
        world_sizes=world_sizes(starts),
        host=start.get("host"),
        slurm_job_id=start.get("slurm_job_id"),
        restarts=max(0, len(starts) - 1),
    )


def _read_config(folder: Path) -> dict | None:
    import yaml

    path = RunPaths(folder).config
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read ({' '.join(str(error).split())}); is it a run folder?") from error
    return settings if isinstance(settings, dict) else {}


def _mtime(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _epoch(step: int, tail: list[dict], evals: list[dict]) -> float:
    """Epochs done after `step` steps, in the proportion of the last row that says both."""
    known = [row for row in [*tail[-1:], *evals[-1:]] if row.get("epoch") and row.get("step")]
    return step * known[0]["epoch"] / known[0]["step"] if known else 0.0


def _last_step(settings: dict, per_epoch: float | None) -> int | None:
    epochs, limit = settings.get("schedule", {}).get("epochs"), settings.get("train", {}).get("max_steps")
    whole = round(steps_of(epochs, per_epoch)) if epochs and per_epoch else None
    known = [value for value in (whole, limit) if value is not None]
    return min(known, default=None)


def _activity(
    start: dict,
    tail: list[dict],
    evals: list[dict],
    step: int,
    last_step: int | None,
    per_epoch: float | None,
    settings: dict,
) -> str:
    """What a running job does: starting, training or evaluating."""
    if not tail or (start and tail[-1]["step"] <= start["step"] and not (evals and evals[-1]["step"] > start["step"])):
        return "starting"
    every = settings.get("train", {}).get("eval_every_epochs", 1.0) * (per_epoch or math.inf)
    due = step == last_step or step // every > (step - 1) // every
    return "evaluating" if due and not (evals and evals[-1]["step"] == step) else "training"


def _judge(folder: Path, activity: str, silent_s: float, step_s: float | None) -> tuple[str, str]:
    """The state and a sentence on it."""
    for name in ("finished", "failed"):
        marker = read_marker(folder, name)
        if marker is not None:
            return name, str(marker.get("message", ""))
    marker = read_marker(folder, "interrupted")
    if marker is not None:
        reason = str(marker.get("reason", "unknown"))
        by_slurm = any(word in reason for word in ("Slurm", "batch script", "to the step", "SIGTERM", "SIGUSR1"))
        return "preempted" if by_slurm else "stopped", f"{reason}; saved at step {marker.get('step')}"
    gone = dead_owner(folder)
    if gone is not None:
        return "stalled", f"{gone} has ended without a word; the same command resumes the run"
    if not RunPaths(folder).ledger.exists() and newest_checkpoint(folder) is not None:
        return "imported", ""
    if silent_s > max(QUIET_S[activity], QUIET_STEPS * (step_s or 0.0)):
        return "stalled", f"last written to {silent_s / 60:.0f} min ago, while {activity}"
    asked = RunPaths(folder).stop
    is_asked = asked.exists() or asked.is_symlink()
    return activity, f"asked to stop: {read_note(asked).strip()}" if is_asked else ""
