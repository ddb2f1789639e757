"""TensorBoard as a view of the ledger, read back from its event files."""

import importlib.util
import signal

import pytest
import runs

from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.run_paths import list_checkpoints
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.tensorboard_view import TensorBoardView
from pipeline.training.validate import validate

pytest.importorskip("tensorboard")
ON = ["--tracking.tensorboard", "true", "--train.precision", "fp32", "--checkpoint.every_steps", "3"]


def read(folder):
    """(tag -> [(step, value)] as TensorBoard has them, names of tags of pictures, steps as they lie in the files)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    found.Reload()
    scalars = {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    raw = [event for path in folder.glob("events.*") for event in EventFileLoader(str(path)).Load()]
    steps = [(value.tag, event.step) for event in raw for value in event.summary.value]
    assert len(set(steps)) == len(steps), "an event lies there twice"
    return scalars, found.Tags()["images"]


def test_a_killed_and_resumed_run_has_every_step_once(root, tmp_path):
    """Events past the checkpoint are there at the kill, and are written again."""
    run = tmp_path / "run"
    options = [*ON, "--tracking.report", "true", "--train.max_steps", "8"]

    def past_a_checkpoint() -> bool:
        saved = any(step >= 3 for step, _ in list_checkpoints(run / "checkpoints"))
        return saved and len(runs.rows(run, "train")) > 4

    program = ["-m", "tests.inject", "wait", "0", "6"]
    runs.stop_when(past_a_checkpoint, signal.SIGKILL, root, run, *options, program=program)
    runs.call(root, run, *options)
    scalars, images = read(run / "tensorboard")
    for kind, group, keys in (
        ("train", "train", ("loss", "lr", "grad_norm", "images_per_s", "epoch")),
        ("eval", "validation", ("val_loss", "val_top1", "val_top5")),
    ):
        for key in keys:
            rows = [(row["step"], row[key]) for row in runs.rows(run, kind)]
            assert [step for step, _ in rows] == (list(range(1, 9)) if kind == "train" else [8])
            found = scalars[f"{group}/{key}"]
            assert [step for step, _ in found] == [step for step, _ in rows], key
            assert [value for _, value in found] == pytest.approx([value for _, value in rows], rel=1e-6)
    assert images and all(name.startswith("report/") for name in images)


def test_a_rollback_is_followed(tmp_path):
    """Rows that the ledger forgets are no events any more; values that are no numbers are left out."""
    ledger = Ledger(tmp_path / "metrics.jsonl", 0)
    said = []
    view = TensorBoardView(tmp_path / "tensorboard", ledger.path, said.append)

    def log(step, loss):
        row = {"kind": "train", "step": step, "loss": loss, "batch_digest": "ab", "skipped": True}
        ledger.append(row)
        view.log(row)

    for step in (1, 2, 3):
        log(step, float(step))
    view.before_rewind({"train": 3})
    ledger.rewind(1, {"kind": "event", "event": "rolled_back", "step": 3})
    view.after_rewind()
    log(2, 20.0)
    log(3, float("nan"))
    view.close()
    scalars, _ = read(tmp_path / "tensorboard")
    assert scalars == {"train/loss": [(1, 1.0), (2, 20.0)]} and not said


def test_a_folder_that_refuses_is_said_once(tmp_path):
    (tmp_path / "tensorboard").write_text("a file is in its place")
    said = []
    view = TensorBoardView(tmp_path / "tensorboard", tmp_path / "metrics.jsonl", said.append)
    for step in (1, 2):
        view.log({"kind": "train", "step": step, "loss": 1.0})
    view.close()
    view.log({"kind": "train", "step": 3, "loss": 1.0})
    (line,) = said
    assert line.startswith("TensorBoard: ") and line.endswith("metrics.jsonl has everything")


def test_a_missing_package_is_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    with pytest.raises(UserError, match="tensorboard is not installed; pip install tensorboard"):
        validate(parse_config(["--config", str(runs.TINY), *ON]), 1, "cpu")
