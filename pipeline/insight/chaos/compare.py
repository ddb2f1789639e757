"""Compares a run with injected faults to a reference run without any. Each difference is a sentence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config import load_config
from pipeline.dataset.index.index import locate_index, open_index
from pipeline.errors import UserError
from pipeline.loader.plan import make_train_plan
from pipeline.run_paths import RunPaths, list_checkpoints
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.run_folder.checkpoint import load_state
from pipeline.training.run_folder.manifest import verify_checkpoint

TIMES = ("images_per_s", "data_wait_fraction")  # differ from run to run
_EXPECTED = {"config.yaml", "metrics.jsonl", "finished", "checkpoints", "report", "wandb", "debug"}


def rows_of(run: Path, kind: str) -> list[dict]:
    """The ledger's rows of a kind, without times."""
    rows = (row for row in read_rows(RunPaths(run).ledger) if row.get("kind") == kind)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two state_dicts differ, by name; tensors bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and torch.equal(
            one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8)
        )
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [item for key in one for item in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return [item for i, (a, b) in enumerate(pairs) for item in differences(a, b, f"{where}[{i}]")]
    return [] if one == other else [where]


def compare_weights(faulted: Path, reference: Path) -> list[str]:
    """The last checkpoints: weights, buffers, optimizer."""
    found = [list_checkpoints(RunPaths(run).checkpoints)[:1] for run in (faulted, reference)]
    if not all(found):
        return ["a run has no checkpoint"]
    (one_step, one), (other_step, other) = (entry[0] for entry in found)
    if one_step != other_step:
        return [f"the last checkpoint is of step {one_step} instead of {other_step}"]
    for path in (one, other):
        verify_checkpoint(path)
    differing = differences(load_state(one), load_state(other))
    return [f"{len(differing)} tensors differ, the first {differing[0]}"] if differing else []


def compare_ledgers(faulted: Path, reference: Path) -> list[str]:
    """Every step once; each row, and each score, as in the reference run."""
    found = []
    steps = [row["step"] for row in rows_of(faulted, "train")]
    if steps != list(range(1, len(steps) + 1)):
        found.append("the ledger's steps have gaps or repeats")
    for kind in ("train", "eval"):
        one, other = rows_of(faulted, kind), rows_of(reference, kind)
        if one != other:
            pairs = zip(one, other, strict=False)
            first = next((a["step"] for a, b in pairs if a != b), min(len(one), len(other)) + 1)
            found.append(f"the {kind} rows differ from step {first} on ({len(one)} and {len(other)} rows)")
    return found


def check_samples(run: Path) -> list[str]:
    """Every sample once an epoch: each batch's digest is that of the plan."""
    config = load_config(RunPaths(run).config)
    index = open_index(locate_index(config.data))
    plan = make_train_plan(index, config.data, config.train, config.augment)
    rows = rows_of(run, "train")
    repeats = plan.augment.repeats  # so many epochs go over all samples, and see each so many times
    seen: dict[int, set[tuple[int, int]]] = {}
    for row in rows:
        ids, epochs, copies = plan.samples_at(row["step"] - 1, 0, plan.global_batch_size)
        if plan.digest(row["step"] - 1, ids) != row["batch_digest"]:
            return [f"step {row['step']} has another batch than the plan"]
        for sample, number, copy in zip(ids.tolist(), (epochs // repeats).tolist(), copies.tolist(), strict=True):
            if (sample, copy) in seen.setdefault(number, set()):
                return [f"sample {sample} is too often in epoch {number * repeats}"]
            seen[number].add((sample, copy))
    whole = plan.epochs_done(len(rows)) // repeats
    return [f"epoch {i * repeats} lacks samples" for i in range(whole) if len(seen[i]) != plan.samples * repeats]


def check_files(faulted: Path, reference: Path) -> list[str]:
    """No unexpected file in the run folder or its checkpoints."""
    found = [f"unexpected file {path.name}" for path in faulted.iterdir() if path.name not in _EXPECTED]
    one, other = ({path.name for path in (RunPaths(run).checkpoints).iterdir()} for run in (faulted, reference))
    extra = {name for name in one if name.startswith(".") or not name.startswith("step-")}
    found += [f"unexpected file checkpoints/{name}" for name in sorted(extra)]
    return found if len(one) == len(other) else [*found, f"{len(one)} checkpoints instead of {len(other)}"]


def wandb_steps(run: Path) -> list[int]:
    """The steps in the run's offline W&B files, as W&B's own tool reads them; a file that a kill cut off is read
    up to there. Raises UserError without that tool."""
    tool = Path(sys.executable).with_name("wandb")
    command = str(tool) if tool.exists() else shutil.which("wandb")
    if command is None:
        raise UserError("--wandb offline: the command wandb is not installed; install it, or give --wandb disabled")
    steps = []
    for file in sorted((RunPaths(run).wandb).glob("offline-run-*/run-*.wandb")):
        done = subprocess.run([command, "leet", "inspect", "--json", str(file)], capture_output=True, text=True)
        for line in done.stdout.splitlines():
            record = json.loads(line)
            if record.get("type") == "history":
                steps.append(int(record["history"]["item"]["_step"]))
    return steps


def check_wandb(run: Path) -> list[str]:
    """No step twice in W&B's files."""
    steps = wandb_steps(run)
    twice = sorted({step for step in steps if steps.count(step) > 1})
    return [f"W&B has {len(twice)} steps twice, the first {twice[0]}"] if twice else []
