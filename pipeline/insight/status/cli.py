"""The verb `status`: how a run stands, from its folder and, where there is one, Slurm's queue."""

import dataclasses
import shutil
import subprocess
import sys
import time
from json import dumps
from pathlib import Path

from pipeline.command import run_command
from pipeline.insight.status.run_state import RunState, read_state
from pipeline.progress import duration
from pipeline.tracking.ledger import world_sizes_in_words

WATCH_EVERY_S = 5.0
ENDED = ("finished", "failed")


def query_slurm(job: str | None) -> dict[str, str] | None:
    """The queue's view of a job: state, reason, time left of the limit; None where there is no Slurm or no such job."""
    squeue = shutil.which("squeue")
    if job is None or squeue is None:
        return None
    command = [squeue, "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return None
    return dict(zip(("state", "reason", "time_left"), lines[0].split("|"), strict=False))


def render(state: RunState, slurm: dict[str, str] | None) -> str:
    """The state as a table."""

    def number(value: float | None, form: str, unit: str = "") -> str:
        return "?" if value is None else format(value, form) + unit

    share = f" ({100 * state.step / state.last_step:.0f} %)" if state.last_step else ""
    rows = [
        ("run", state.run),
        ("state", state.state + (f": {state.detail}" if state.detail else "")),
        ("step", f"{state.step:,} of {number(state.last_step, ',')}{share}, epoch {state.epoch:.2f}"),
        ("loss", number(state.loss if not isinstance(state.loss, str) else None, ".4f")),
    ]
    if state.top1 is None:
        rows.append(("top-1", "not evaluated yet"))
    else:
        best = f"best {state.best_top1:.2f} % at step {state.best_step:,}"
        partly = f" ({state.left_out})" if state.left_out else ""
        rows.append(("top-1", f"{state.top1:.2f} % at step {state.top1_step:,}{partly}; {best}"))
    data_wait_fraction = None if state.data_wait_fraction is None else 100 * state.data_wait_fraction
    rows.append(
        ("speed", f"{number(state.images_per_s, ',.0f')} images/s, data wait {number(data_wait_fraction, '.0f', ' %')}")
    )
    if state.state not in ENDED:
        rows.append(("time left", f"{duration(state.left_s)} of training"))
    if state.checkpoint_step is None:
        rows.append(("checkpoint", "none yet"))
    else:
        rows.append(("checkpoint", f"step {state.checkpoint_step:,}, {duration(state.checkpoint_age_s)} old"))
    where = (
        f"{number(state.world_size, 'd')} process{'es' if state.world_size != 1 else ''}, first on {state.host or '?'}"
    )
    rows.append(("place", f"{where}; started {state.restarts + 1} times" if state.restarts else where))
    if sizes := world_sizes_in_words(state.world_sizes):
        rows.append(("processes", sizes))
    if state.slurm_job_id is not None:
        seen = "no longer known to the queue" if slurm is None else slurm["state"]
        if slurm is not None and slurm["state"] == "PENDING":
            seen += f" ({slurm['reason']})"
        elif slurm is not None and slurm["state"] == "RUNNING":
            seen += f", {slurm['time_left']} of its time limit left"
        rows.append(("Slurm job", f"{state.slurm_job_id}: {seen}"))
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def status(run: str, watch: bool = False, json: bool = False) -> int:
    """Show how a run stands, also while it runs and from another machine that sees its folder.

    Args:
        run: the run folder.
        watch: show it again every 5 s until the run ends.
        json: print one JSON object instead; times in seconds.
    """
    while True:
        state = read_state(Path(run).expanduser().resolve())
        slurm = query_slurm(state.slurm_job_id)
        if json:
            text = dumps(dataclasses.asdict(state) | {"slurm": slurm})
        else:
            text = render(state, slurm)
        if watch and sys.stdout.isatty() and not json:
            text = f"\033[H\033[J{text}"
        print(text, flush=True)
        if not watch or state.state in ENDED:
            return 0
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return 0


def main(argv: list[str]) -> int:
    return run_command(status, "status", argv)
