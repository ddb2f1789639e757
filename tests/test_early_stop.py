"""`train.stop_after_evals_without_gain`: the run ends as finished, at the same step however often it was resumed."""

import json
import shutil

import pytest
import runs

from pipeline.__main__ import main
from pipeline.tracking.eval_rows import early_stop, evals_without_gain

#: a network that learns nothing, BatchNorm's statistics included: each evaluation after the first is without a gain
STILL = [
    *("--optim.lr", "1e-30", "--optim.weight_decay", "0", "--model.freeze", "body", "--schedule.warmup_epochs", "0"),
    *("--train.precision", "fp32", "--train.deterministic", "true"),
]
PATIENT = [*STILL, "--train.eval_every_epochs", "0.5", "--train.stop_after_evals_without_gain"]


def scores(*top1):
    return [{"kind": "eval", "step": 10 * i, "val_top1": value} for i, value in enumerate(top1, 1)]


def test_evaluations_without_a_gain_are_counted_from_the_best():
    assert evals_without_gain([]) == 0
    assert evals_without_gain(scores(10, 20, 30)) == 0
    assert evals_without_gain(scores(10, 30, 20, 30)) == 2  # the same again is no gain
    averaged = [*scores(10, 20), {"kind": "eval", "step": 30, "val_top1": 5, "val_ema_top1": 25}]
    assert evals_without_gain(averaged) == 0


@pytest.mark.parametrize(("patience", "stops"), [(None, False), (3, False), (2, True), (1, True)])
def test_patience(patience, stops):
    found = early_stop(scores(10, 30, 20, 29.5), patience)
    assert (found is not None) == stops
    assert found is None or "30.00 % of step 20" in found


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """A run that may take 19 steps, evaluated about every 2.4."""
    run = tmp_path_factory.mktemp("early") / "run"
    runs.call(root, run, *PATIENT, "2")
    return run


def ends(run):
    return [(row["step"], row.get("reason")) for row in runs.rows(run, "event") if row["event"] == "finished"]


def test_the_run_ends_as_finished_and_says_why(root, stopped, capsys):
    evaluated = [row["step"] for row in runs.rows(stopped, "eval")]
    assert len(evaluated) == 3 and runs.rows(stopped, "train")[-1]["step"] == evaluated[-1] < 19
    ((step, reason),) = ends(stopped)
    assert step == evaluated[-1] and "stopped early: 2 evaluations without a top-1 above" in reason
    assert json.loads((stopped / "finished").read_text())["message"] == reason
    assert runs.checkpoint_at(stopped, step).is_dir()
    assert main(["status", str(stopped)]) == 0
    assert f"finished: {reason}" in capsys.readouterr().out


def test_started_again_it_stays_finished_also_without_checkpoints(root, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    ledger = (run / "metrics.jsonl").read_bytes()
    assert "already finished: stopped early" in runs.call(root, run, *PATIENT, "2")
    shutil.rmtree(run / "checkpoints")
    assert "already finished: stopped early" in runs.call(root, run, *PATIENT, "2")
    assert (run / "metrics.jsonl").read_bytes() == ledger


def test_with_more_patience_it_goes_on(root, stopped, tmp_path):
    run = shutil.copytree(stopped, tmp_path / "run")
    runs.call(root, run, *PATIENT, "4")
    assert len(runs.rows(run, "eval")) == 5
    assert "stopped early: 4 evaluations" in json.loads((run / "finished").read_text())["message"]
    assert [row["step"] for row in runs.rows(run, "train")] == list(range(1, ends(run)[-1][0] + 1))


@pytest.mark.parametrize("limit", [3, 5, 7])
def test_resumed_in_between_it_ends_at_the_same_step(root, stopped, tmp_path, limit):
    run = tmp_path / "run"
    runs.call(root, run, *PATIENT, "2", "--train.max_steps", str(limit), "--checkpoint.every_steps", "1")
    last = runs.rows(run, "eval")[-1]["step"]  # of the limit, which is scored too
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    between = [row for row in rows if not (f'"kind": "eval", "step": {last},' in row and last not in due(stopped))]
    (run / "metrics.jsonl").write_text("".join(between))
    runs.call(root, run, *PATIENT, "2")
    assert ends(run)[-1] == ends(stopped)[-1]
    assert runs.repeatable(run) == runs.repeatable(stopped)


def due(run):
    return {row["step"] for row in runs.rows(run, "eval")}


@pytest.mark.parametrize("value", ["0", "-1"])
def test_no_patience_is_refused(root, tmp_path, value):
    assert "--train.stop_after_evals_without_gain" in runs.call(root, tmp_path / "run", *PATIENT, value, expect=2)


def test_a_run_of_full_length_did_not_stop_early(root, tmp_path):
    """Though its patience ends with its last evaluation. The same when it is started again."""
    run, options = tmp_path / "run", [*PATIENT, "1", "--train.max_steps", "5"]
    for _ in range(2):
        assert "stopped early" not in runs.call(root, run, *options)
        assert len(due(run)) == 2 and ends(run) == [(5, None)]
        assert "stopped early" not in (run / "finished").read_text()


def test_two_ranks_agree(root, stopped, tmp_path):
    runs.train(root, tmp_path / "run", *PATIENT, "2", processes=2)
    assert ends(tmp_path / "run") and ends(tmp_path / "run")[0][0] == ends(stopped)[0][0]
