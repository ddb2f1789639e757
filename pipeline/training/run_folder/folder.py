"""The run folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`, and the markers by which others see how it stands.

`lock` names the process that trains there (see `lock`). `stop` asks a run to save and go. `interrupted`,
`finished` and `failed` say how the last start ended (JSON).
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.command import raising
from pipeline.config import Config, ResolvedDataConfig, load_config, semantic_config, to_yaml
from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.files import atomic_write, read_note, why_unfit
from pipeline.redact import redact
from pipeline.run_paths import END_MARKERS, RunPaths, list_checkpoints
from pipeline.tracking.eval_rows import left_out_note
from pipeline.training.run_folder.same_recipe import compare_semantic_config

WRITTEN = "# Written by pipeline train at each start.\n"  #: the first line of our config.yaml
#: what starts that were killed leave behind; see `pipeline.files.atomic_open`
_LEFTOVER = re.compile(
    r"\.(config\.yaml|metrics\.jsonl|interrupted|finished|failed|stop|writable)\.\d+(-[0-9a-f]{8})?\.tmp"
)


@dataclass(frozen=True)
class RunFolder(RunPaths):
    """A run's folder: its paths, and what is written there."""

    def check_recipe(self, config: Config) -> None:
        """Raises UserError if a run of another recipe has begun here. One that broke off before its ledger's first row,
        over a wrong option say, has not."""
        begun = self.ledger.exists() or list_checkpoints(self.checkpoints)
        if begun and self.config.exists():
            try:
                with raising("train"):
                    there = semantic_config(load_config(self.config))
            except UserError as error:
                raise UserError(
                    f"{self.config} is damaged ({str(error).partition(';')[0]}); remove it, and the same command "
                    "writes it again: the checkpoints have the settings, too"
                ) from error
            compare_semantic_config(there, semantic_config(config), "run folder", self.path, config.given)

    def save_config(self, config: Config) -> None:
        """Write `config.yaml` atomically. What a recipe says of itself may name its source: without credentials.

        `resume` is of one start, so it is not saved. A file that somebody else wrote is kept as `config.given.yaml`.
        """
        self._keep_given_config()
        about = json.loads(redact(json.dumps(config.about)))
        atomic_write(
            self.config,
            WRITTEN + to_yaml(dataclasses.replace(config, about=about, resume="auto", data=_absolute(config.data))),
        )

    def _keep_given_config(self) -> None:
        if not self.config.exists() or self.config.read_bytes().startswith((WRITTEN.encode(), b"run_dir:")):
            return
        names = ["config.given.yaml", *(f"config.given-{number}.yaml" for number in range(2, 1000))]
        kept = next(self.path / name for name in names if not (self.path / name).exists())
        self.config.rename(kept)

    def mark(self, name: str, **facts: object) -> None:
        """Write the marker `name` atomically; of interrupted, finished and failed only one stands."""
        for other in END_MARKERS:
            if other != name:
                (self.path / other).unlink(missing_ok=True)
        facts = {"state": name, **facts, "time": time.time(), "host": socket.gethostname()}
        atomic_write(self.path / name, json.dumps(facts) + "\n")

    def clear_marks(self, but: tuple[str, ...] = ()) -> None:
        """Remove the marks of the start before this one, except those in `but`."""
        for name in END_MARKERS:
            if name not in but:
                (self.path / name).unlink(missing_ok=True)

    def clear_stop(self) -> None:
        """Remove a request to stop, unless it was meant for this start."""
        if not is_for_this_start(self.stop):
            self.stop.unlink(missing_ok=True)


def _absolute(data: ResolvedDataConfig) -> ResolvedDataConfig:
    """The same with the places of the data as they are found from any folder."""
    root = str(Path(data.root).expanduser().absolute()) if data.root else data.root
    index = str(Path(data.index).expanduser().absolute()) if data.index else data.index
    return dataclasses.replace(data, root=root, index=index)


def make_run_folder(config: Config) -> RunFolder:
    """Make the run folder where it is missing. Rank 0 only. Raises UserError where there is no name for it, or it can't
    be written."""
    if not config.run_dir:
        raise UserError("--run_dir is missing: give the folder where the run is to live, e.g. --run_dir runs/first")
    folder = RunFolder(Path(config.run_dir).expanduser().resolve())
    files = folder.config, folder.ledger, *(folder.path / name for name in END_MARKERS), folder.lock, folder.stop
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a folder, and a run needs a file there; move it, or give another --run_dir")
    for place in (folder.path, folder.checkpoints):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, and a run needs a folder there; move it, or give another --run_dir")
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run folder {folder.path} can't be written ({error.strerror}); give another --run_dir"
        ) from error
    unfit = why_unfit(folder.path)
    if unfit is not None:
        raise UserError(f"run folder {folder.path} {unfit}; give another --run_dir")
    return folder


def open_run_folder(config: Config) -> RunFolder:
    """The run folder, checked; `accept_start` follows. Rank 0 only, which holds its lock.

    Raises UserError where it was made with other settings, or has checkpoints though `--resume never` is given.
    """
    folder = make_run_folder(config)
    folder.check_recipe(config)
    if config.resume == "never" and list_checkpoints(folder.checkpoints):
        raise UserError(
            f"--resume never: run folder {folder.path} has checkpoints; remove them or give another --run_dir"
        )
    for leftover in folder.path.glob(".*.tmp"):
        if _LEFTOVER.fullmatch(leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)  # if it is a folder
            with contextlib.suppress(OSError):  # another user's
                leftover.unlink(missing_ok=True)
    if not (folder.ledger.exists() and folder.config.exists()) and not list_checkpoints(folder.checkpoints):
        folder.save_config(config)  # else not before the checkpoints agree
    folder.clear_stop()
    return folder


def accept_start(folder: RunFolder, config: Config) -> None:
    """The start is refused no more: its settings and its state are those of the run now. Rank 0 only."""
    folder.save_config(config)
    folder.clear_marks(but=("finished",))  # that goes when a step is to be trained


def is_for_this_start(stop: Path) -> bool:
    """Was this request to stop made after the job's start, while Python was still being imported? A batch script
    begins it with the job's id and restart count, as in `12.0 USR1`."""
    try:
        whose = read_note(stop).split(maxsplit=1)[:1]
    except FileNotFoundError:
        return False
    job, count = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return whose == [f"{job}.{count}"]


def slurm_facts() -> dict:
    """The Slurm job's id and restart count, where there is one."""
    names = {"slurm_job_id": "SLURM_JOB_ID", "slurm_restart_count": "SLURM_RESTART_COUNT"}
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def event_row(name: str, step: int, **facts: object) -> dict:
    """The ledger's row of what happened to a run."""
    here = {"time": time.time(), "host": socket.gethostname(), **slurm_facts()}
    return {"kind": "event", "event": name, "step": step, **here, **facts}


def mark_finished(
    folder: RunFolder, scores: dict, verb: str, say: Callable[[str], None], reason: str | None = None
) -> None:
    """Write the marker `finished` and print it. scores: the ledger's row of the last evaluation; reason: why that came
    before the last step, if it did."""
    keys = ("step", "val_top1", "val_top5", "val_ema_top1", "val_ema_top5", "images", "left_out")
    facts = {key: scores[key] for key in keys if key in scores}
    folder.mark("finished", **facts, **({"message": reason} if reason else {}))
    average = f", with averaged weights {scores['val_ema_top1']:.2f} %" if "val_ema_top1" in scores else ""
    score = f"top-1 {scores['val_top1']:.2f} %{average}{left_out_note(scores)}"
    early = f"{reason}; " if reason else ""
    say(f"{verb}: {early}{count(scores['step'], 'step')}, {score}; {folder.path}")
