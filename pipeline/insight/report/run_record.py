"""The data of a run's report: its ledger in columns, its settings, its starts, and its network before and after."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.config import Config, load_config, semantic_config
from pipeline.dataset.index.index import Index, locate_index, open_index
from pipeline.errors import TransientError, UserError
from pipeline.evaluation.checkpoints import find_checkpoint
from pipeline.model.build import build_model
from pipeline.model.heads import count_outputs
from pipeline.model.weights import load_whole, start_from
from pipeline.run_paths import not_a_run_message
from pipeline.tracking.eval_rows import best_step, better_scores
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.run_folder.best import place_of_weights
from pipeline.training.run_folder.checkpoint import load_state
from pipeline.training.run_folder.folder import RunFolder


def number(value: object) -> float:
    """A ledger's value as a float; NaN for what is not a number (the ledger writes NaN and infinity as words)."""
    return float(value) if isinstance(value, float | int) else math.nan


@dataclass(frozen=True)
class Record:
    """One run. train, evals, events: rows of its ledger; hours: of training up to each training row, without pauses."""

    folder: RunFolder
    config: Config
    train: list[dict]
    evals: list[dict]
    events: list[dict]
    hours: list[float]
    name: str

    @property
    def settings(self) -> dict:
        return semantic_config(self.config)

    @property
    def best(self) -> dict | None:
        step = best_step(self.evals)
        return next((row for row in self.evals if row["step"] == step), None)

    def column(self, name: str, kind: str = "train") -> list[float]:
        return [number(row.get(name)) for row in (self.train if kind == "train" else self.evals)]

    def lost(self, name: str, kind: str = "train") -> int:
        """How many values of a column are NaN or infinite, which a ledger has as words."""
        return sum(isinstance(row.get(name), str) for row in (self.train if kind == "train" else self.evals))

    def eval_hours(self) -> list[float]:
        """Hours of training done at each evaluation."""
        done = {row["step"]: hours for row, hours in zip(self.train, self.hours, strict=True)}
        return [done.get(row["step"], math.nan) for row in self.evals]


def read_record(run: str) -> Record:
    """Read a run folder, also of a run that is still training. Raises UserError if it is not one."""
    folder = RunFolder(Path(run).expanduser().resolve())
    if not folder.config.exists():
        raise UserError(not_a_run_message(run))
    config = load_config(folder.config, verb="report")
    rows: dict[str, list[dict]] = {"train": [], "eval": [], "event": []}
    for row in read_rows(folder.ledger):
        if row.get("kind") in rows:
            rows[row["kind"]].append(row)
    hours, total = [], 0.0
    for row in rows["train"]:
        rate = number(row.get("images_per_s"))
        total += config.train.global_batch_size / rate / 3600 if rate > 0 else 0.0
        hours.append(total)
    return Record(folder, config, rows["train"], rows["eval"], rows["event"], hours, folder.path.name)


@dataclass
class Networks:
    """The network with its initial and with its trained weights (torchvision modules).

    Attributes:
        before: with its initial weights; None if they can't be made again.
        after: with a checkpoint's weights.
        step: of that checkpoint.
        averaged: `after` has the averaged weights (EMA).
        outputs: how many classes it has.
        classes: synsets of its outputs, where the checkpoint has them.
        missing: why `before` is None.
    """

    before: nn.Module | None
    after: nn.Module
    step: int
    averaged: bool
    outputs: int
    classes: list[str] | None
    missing: str = ""


def open_index_of(record: Record, data_root: str | None, index: str | None = None) -> Index:
    """The run's data set. Raises UserError where it is missing."""
    if not (index or data_root or record.config.data.root):
        raise UserError("the run has no data.root; give --data_root")
    return open_index(locate_index(record.config.data, data_root, index))


def load_networks(record: Record) -> Networks:
    """The network with its initial weights, which follow from the seed, and with a checkpoint's: the best one's, or the
    last one's; raw or averaged, whichever scored better. Raises UserError where there is no checkpoint yet."""
    try:
        path, meta = find_checkpoint(record.folder, "best")
    except UserError:
        path, meta = find_checkpoint(record.folder, "last")
    scores = next((row for row in record.evals if row["step"] == meta["step"]), None)
    averaged = scores is not None and better_scores(scores)["averaged"] and "ema.pt" in meta["files"]
    part = "ema" if averaged else "model"
    state = load_state(path, [part])[part]
    config = record.config.model
    outputs = count_outputs(config, state)
    torch.manual_seed(record.config.train.seed)
    initial, missing = build_model(config, outputs).requires_grad_(True), ""
    before: nn.Module | None = initial
    try:
        start_from(initial, config, meta.get("classes"), place=place_of_weights(config))
    except (UserError, TransientError) as error:
        before, missing = None, f"the initial weights can't be made again: {error}"
    after = build_model(config, outputs)
    load_whole(after, state)
    return Networks(before, after.requires_grad_(True), meta["step"], averaged, outputs, meta.get("classes"), missing)
