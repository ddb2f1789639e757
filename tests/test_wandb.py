"""W&B sees one run over all restarts, each step once, and can never stop the training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from pipeline.config import TrackingConfig
from pipeline.dataset.index.scan import build_index
from pipeline.tracking.wandb_view import WandbView

LEET = Path(sys.executable).with_name("wandb")


def history(run_dir: Path) -> list[dict]:
    """The rows of all offline files of a run, in order, as W&B's own tool reads them."""
    found = []
    for file in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        found += [record["history"]["item"] for record in inspect(file) if record["type"] == "history"]
    return found


def inspect(file: Path) -> list[dict]:
    """The records of an offline file."""
    done = subprocess.run([LEET, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_killed_and_resumed_is_one_run_without_repeated_steps(synthetic_root, tmp_path):
    build_index(synthetic_root)
    run = tmp_path / "run"
    options = ["--tracking.wandb", "offline", "--checkpoint.every_steps", "4", "--train.max_steps", "12"]
    runs.kill_once_saved(4, synthetic_root, run, *options)
    had = len(runs.rows(run, "train"))
    runs.train(synthetic_root, run, *options)
    files = list((run / "wandb").glob("offline-run-*"))
    assert len(files) == 2 and len({file.name.split("-")[-1] for file in files}) == 1  # one id
    steps = [row["_step"] for row in history(run)]
    assert len(steps) == len(set(steps)), steps
    assert [step for step in steps if step > had] == list(range(had + 1, 13))
    last = history(run)[-1]
    row, score = runs.rows(run, "train")[-1], runs.rows(run, "eval")[-1]
    assert last["loss"] == row["loss"] and last["val_top1"] == score["val_top1"]


def test_steps_sent_before_a_second_kill_are_not_sent_again(tmp_path):
    """The ledger forgets steps that are done again; what W&B got is remembered beside it."""
    for last, logged in (({"train": 10, "eval": 8}, 8), ({"train": 8, "eval": 4}, 12)):
        view = WandbView(TrackingConfig(wandb="offline"), tmp_path, {}, last, print)
        for step in range(5, logged + 1):
            view.log({"kind": "train", "step": step, "loss": 0.1 * step})
        view.close()
    assert [row["_step"] for row in history(tmp_path)] == [11, 12]


def test_an_evaluation_after_a_kill_comes_beside_the_next_step(tmp_path):
    """W&B takes nothing for a step that it has: the kill came between a step's row and its evaluation's, and again."""
    for first, last in (((1, {}), 4), ((4, {"train": 4}), 6), ((5, {"train": 6, "eval": 4}), 8)):
        view = WandbView(TrackingConfig(wandb="offline"), tmp_path, {}, first[1], print)
        if first[0] == 4:
            view.log({"kind": "eval", "step": 4, "val_top1": 50.0})
        for step in range(first[0], last + 1):
            view.log({"kind": "train", "step": step, "loss": 0.1 * step})
        view.close()
    rows = history(tmp_path)
    assert [row["_step"] for row in rows] == list(range(1, 9))
    assert [row["_step"] for row in rows if "val_top1" in row] == [5]


@pytest.mark.parametrize("way", ["raises", "namespace"])
def test_trouble_with_wandb_is_said_once_and_borne(tmp_path, monkeypatch, way):
    said = []
    if way == "namespace":  # a folder named wandb/ in the working directory, and no package
        monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    view = WandbView(TrackingConfig(wandb="offline"), tmp_path, {}, {}, said.append)
    if way == "raises":
        monkeypatch.setattr(view.run, "log", lambda *_, **__: 1 / 0)
    for step in (1, 2, 3):
        view.log({"kind": "train", "step": step, "loss": 1.0})
    view.close()
    assert len(said) == 1 and "metrics.jsonl has everything" in said[0]


def test_disabled_leaves_no_trace(tmp_path):
    WandbView(TrackingConfig(wandb="disabled"), tmp_path, {}, {}, print).close()
    assert not list(tmp_path.iterdir())


def test_wandb_tool_is_there():
    assert shutil.which(LEET), "the tests read offline files with W&B's own tool"
