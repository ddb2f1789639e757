"""The verb `status`: how a run stands, from its folder and, where there is one, Slurm's queue."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from json import dumps
from pathlib import Path
from typing import Literal

from pipeline.command import run_command
from pipeline.counts import count
from pipeline.errors import UserError, permission_problem
from pipeline.insight.runs import distinct_names, expand
from pipeline.insight.status.run_state import RunState, read_state
from pipeline.progress import can_redraw, duration
from pipeline.tracking.ledger_rows import world_sizes_in_words

WATCH_EVERY_S = 5.0
ENDED = ("finished", "failed", "imported", "unreadable")


def query_slurm(job: str | None) -> tuple[dict[str, str] | None, str]:
    """The queue's view of a job (state, reason, time left of the limit), or None, and why there is none, in words."""
    if job is None:
        return None, ""
    squeue = shutil.which("squeue")
    if squeue is None:
        return None, "not asked about, there is no squeue here"
    command = [squeue, "--noheader", "--states=all", f"--jobs={job}", "--format=%A|%T|%r|%L"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, env=plain | {"LC_ALL": "C"})
    except (OSError, subprocess.TimeoutExpired):
        return None, "Slurm does not answer"
    if done.returncode and "Invalid job id" not in done.stderr:
        return None, "Slurm does not answer"
    for line in done.stdout.splitlines():
        number, _, rest = line.partition("|")
        if number == job:  # the number of an array's last task is the whole array's, too
            return dict(zip(("state", "reason", "time_left"), rest.split("|"), strict=False)), ""
    return None, "no longer known to the queue"


def render(state: RunState, slurm: dict[str, str] | None, why_none: str = "") -> str:
    """The state as a table."""

    def number(value: float | None, form: str, unit: str = "") -> str:
        return "?" if value is None else format(value, form) + unit

    share = f" ({100 * state.step / state.last_step:.0f} %)" if state.last_step else ""
    rows = [
        ("run", state.run),
        ("state", state.state + (f": {state.detail}" if state.detail else "")),
        ("step", f"{state.step:,} of {number(state.last_step, ',')}{share}, epoch {state.epoch:.2f}"),
        ("loss", state.loss if isinstance(state.loss, str) else number(state.loss, ".4f")),
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
    rows.append(("place", f"{where}; started {count(state.restarts + 1, 'time')}" if state.restarts else where))
    if sizes := world_sizes_in_words(state.world_sizes):
        rows.append(("processes", sizes))
    if state.slurm_job_id is not None:
        seen = why_none if slurm is None else slurm["state"]
        if slurm is not None and slurm["state"] == "PENDING":
            seen += f" ({slurm['reason']})"
        elif slurm is not None and slurm["state"] == "RUNNING":
            seen += f", {slurm['time_left']} of its time limit left"
        rows.append(("Slurm job", f"{state.slurm_job_id}: {seen}"))
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


COLUMNS = {"run": "<", "state": "<", "step": "<", "best top-1": ">", "images/s": ">", "time left": ">", "": "<"}


SHORTEST = 12  # characters of a cell that was cut; less says nothing


def cells(state: RunState) -> list[str]:
    """A run in the columns of a list."""
    step = f"{state.step:,}" if state.last_step is None else f"{state.step:,} of {state.last_step:,}"
    best = "?" if state.best_top1 is None else f"{state.best_top1:.2f} %"
    speed = "?" if state.images_per_s is None else f"{state.images_per_s:,.0f}"
    left = "" if state.state in ENDED else duration(state.left_s)
    return [state.run, state.state, step, best, speed, left, state.detail]


def render_list(states: list[RunState], best_first: bool, columns: int | None = None) -> str:
    """Several runs, a line each. columns: of the terminal; what is too long for it loses the end of its last cell, and
    of the runs' folders what they have in common."""
    if best_first:
        states = sorted(states, key=lambda state: -1.0 if state.best_top1 is None else state.best_top1, reverse=True)
    rows = [list(COLUMNS), *map(cells, states)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if columns is not None:
        room = columns - sum(widths[1:-1]) - 2 * (len(widths) - 2)
        if widths[0] > room:
            for row, name in zip(rows[1:], distinct_names([Path(state.run) for state in states]), strict=True):
                row[0] = name
            widths[0] = max(len(row[0]) for row in rows)
        last = room - widths[0] - 2
        for row in rows[1:]:
            row[-1] = row[-1] if len(row[-1]) <= last else f"{row[-1][: last - 1]}…" if last >= SHORTEST else ""
        widths[-1] = max(len(row[-1]) for row in rows)
    layout = list(zip(COLUMNS.values(), widths, strict=True))
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, layout, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def status(runs: list[str], watch: bool = False, json: bool = False, sort: Literal["given", "best"] = "given") -> int:
    """Show how runs stand, also while they train and from another machine that sees their folders.

    Args:
        runs: run folders, or folders of runs; several are shown a line each.
        watch: show it again every 5 s until the runs end.
        json: print one JSON object a run and line instead; times in seconds.
        sort: several runs: as given, or the best top-1 first.
    """
    while True:
        folders = expand(runs)
        states = [read_state(folder) for folder in folders] if len(folders) == 1 else list(map(_state_of_one, folders))
        queued = [query_slurm(state.slurm_job_id) for state in states] if json or len(states) == 1 else []
        if json:
            text = "\n".join(
                dumps(dataclasses.asdict(state) | {"slurm": slurm})
                for state, (slurm, _) in zip(states, queued, strict=True)
            )
        elif len(states) > 1:
            columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            text = render_list(states, sort == "best", columns)
        else:
            text = render(states[0], *queued[0])
        if watch and can_redraw(sys.stdout) and not json:
            text = f"\033[H\033[J{text}"
        print(text, flush=True)
        if not watch or all(state.state in ENDED for state in states):
            return 0
        try:
            time.sleep(WATCH_EVERY_S)
        except KeyboardInterrupt:
            return 0


def _state_of_one(folder: Path) -> RunState:
    """The state of one of several runs; a damaged folder hides none of the others."""
    try:
        return read_state(folder)
    except UserError as error:
        return RunState(str(folder), "unreadable", str(error))
    except PermissionError as error:
        return RunState(str(folder), "unreadable", str(permission_problem(error)))


def main(argv: list[str]) -> int:
    return run_command(status, "status", argv)
