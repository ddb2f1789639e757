"""The package from Python."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import runs

import pipeline
from pipeline.errors import UserError

SCRIPT = Path(__file__).parents[1] / "examples/ten_lines.py"


def test_the_ten_lines(root, tmp_path):
    command = [sys.executable, str(SCRIPT), str(root), str(tmp_path / "run")]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^4 steps, last loss \d\.\d+, top-1 \d+\.\d+ %$", done.stdout, re.M), done.stdout
    assert (tmp_path / "run/finished").exists()


def test_a_run_is_that_of_the_command(root, tmp_path):
    """The same ledger; signal handlers are put back; a second call finds it finished."""
    options = {"data.root": root, "train.max_steps": 3, "train.precision": "fp32", "data.crop_area": [0.5, 1.0]}
    config = pipeline.load_config(runs.TINY, options | {"run_dir": tmp_path / "own"})
    assert config.data.crop_area == (0.5, 1.0) and config.train.max_steps == 3
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    assert pipeline.train(config) and pipeline.train(config)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers
    command = ["--train.max_steps", "3", "--train.precision", "fp32", "--data.crop_area", "[0.5, 1.0]"]
    runs.call(root, tmp_path / "command", *command)
    assert runs.repeatable(tmp_path / "own") == runs.repeatable(tmp_path / "command")
    assert [row["step"] for row in pipeline.read_ledger(tmp_path / "own", "train")] == [1, 2, 3]
    assert {row["kind"] for row in pipeline.read_ledger(tmp_path / "own")} == {"train", "eval", "event"}
    scores = pipeline.evaluate(tmp_path / "own", device="cpu")
    assert scores["images"] == 24 and scores["results"][0]["val_top1"] == scores["val_top1"]
    (row,) = pipeline.read_ledger(tmp_path / "own", "eval")
    assert scores["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5)


def test_mistakes_are_one_line(tmp_path, capsys):
    for recipe, options, said in (
        ("resnet512", {}, "is neither a file nor a recipe"),
        ("smoke", {"optim.lrr": 0.1}, "did you mean --optim.lr"),
        ("smoke", {"train.max_steps": "many"}, "--train.max_steps many: give a whole number"),
        ("smoke", {"augment.mixup": -1}, "augment.mixup is -1"),
    ):
        with pytest.raises(UserError, match=said) as found:
            pipeline.load_config(recipe, options)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="unknown option chekpoint"):
        pipeline.evaluate(tmp_path, chekpoint="best")
    with pytest.raises(UserError, match="has no metrics"):
        pipeline.read_ledger(tmp_path)
    assert capsys.readouterr().err == ""
