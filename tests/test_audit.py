"""`pipeline audit`: the digests of a ledger computed again, and the batches of several runs compared."""

import json
import shutil

import pytest
import runs
from test_index import change_label

from pipeline.config import load_config
from pipeline.dataset.index.index import open_sound
from pipeline.loader.plan import make_train_plan
from pipeline.tracking.ledger_rows import TRAINING_UNREADABLE, lost_in_words, lost_steps


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run of 8 steps with mixing and erasing, resumed once."""
    run = tmp_path_factory.mktemp("audited") / "run"
    drawn = ("--augment.mixup", "0.2", "--augment.random_erase", "0.5")
    runs.call(root, run, *drawn, "--train.max_steps", "5")
    runs.call(root, run, *drawn, "--train.max_steps", "8")
    return run


def edit(run, step, **fields):
    """Change fields of a step's row of the ledger."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train" and row["step"] == step:
            row.update(fields)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_batch_of_a_run_is_as_its_recipe_says(finished, tmp_path):
    output = runs.capture(["audit", str(finished), "--json", str(tmp_path / "found.json")])
    assert "steps 1 to 8" in output and "every batch" in output and "WRONG" not in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["good"] and found["runs"][0]["checked"] == 8


@pytest.mark.parametrize(("every", "expect"), [("1", 2), ("3", 2), ("4", 0)])
def test_a_row_that_was_changed_is_found(finished, tmp_path, every, expect):
    """Step 7 has the digest of another batch; every fourth batch are steps 1 and 5."""
    run = shutil.copytree(finished, tmp_path / "run")
    edit(run, 7, batch_digest=runs.rows(run, "train")[0]["batch_digest"])
    output = runs.capture(["audit", str(run), "--every", every], expect)
    assert ("first at step 7" in output) == (expect == 2)


@pytest.mark.parametrize("name", ["batch_digest", "data_wait_fraction"])
def test_a_damaged_name_in_the_last_row_is_no_traceback(finished, tmp_path, name):
    """One flipped bit: the line is whole, and a field is missing."""
    run = shutil.copytree(finished, tmp_path / "run")
    before, found, after = (run / "metrics.jsonl").read_text().rpartition(f'"{name}"')
    (run / "metrics.jsonl").write_text(before + found.replace("a", "`") + after)
    output = runs.capture(["audit", str(run)], expect=2 if name == "batch_digest" else 0)
    assert ("the first at step 8" in output) == (name == "batch_digest")
    assert "step        8 of 8" in runs.capture(["status", str(run)])


def test_an_index_that_was_changed_proves_nothing(finished, root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    change_label(data / "index")
    output = runs.capture(["audit", str(finished), "--data_root", str(data)], expect=2)
    assert "its records were changed" in output and "every batch" not in output


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seed: 0", "seed: 1"),
        ("mixup: 0.2", "mixup: 0.3"),
        ("random_erase: 0.5", "random_erase: 0.4"),
        ("label_smoothing: 0.0", "label_smoothing: 0.1"),
    ],
)
def test_a_recipe_that_was_changed_is_found(finished, tmp_path, setting, value):
    """The last one changes no batch: the checkpoints tell."""
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    assert setting in text
    (run / "config.yaml").write_text(text.replace(setting, value))
    output = runs.capture(["audit", str(run)], expect=2)
    (name, before), after = setting.split(": "), value.split(": ")[1]
    assert f"{name} is {after} in config.yaml, and {before} in the checkpoints" in output
    shutil.rmtree(run / "checkpoints")
    in_no_digest = name == "label_smoothing"
    output = runs.capture(["audit", str(run)], expect=0 if in_no_digest else 2)
    assert ("no checkpoint is left, so settings" in output) == in_no_digest


def test_runs_are_compared_with_the_first_one(finished, root, tmp_path):
    other = tmp_path / "other"
    runs.call(root, other, "--train.seed", "1", "--train.max_steps", "2")
    same = shutil.copytree(finished, tmp_path / "same")
    assert "run and same: the same batches, steps 1 to 8" in runs.capture(["audit", str(finished), str(same)])
    output = runs.capture(["audit", str(finished), str(other)], expect=2)
    assert "2 of 2 batches differ, the first at step 1" in output and output.count("as recipe, seed and index say") == 2


def test_a_folder_of_runs_is_checked_without_those_that_can_not_be(finished, tmp_path):
    """One failed before its first step, one has a damaged configuration."""
    folder = tmp_path / "runs"
    for name in ("a", "b", "c"):
        shutil.copytree(finished, folder / name)
    (folder / "a/metrics.jsonl").unlink()
    (folder / "b/config.yaml").write_text("optim: [lr")
    shutil.copytree(finished, folder / "d")
    (folder / "d/config.yaml").write_text("optim: {lr: fast}")
    output = runs.capture(["audit", str(folder)])
    assert f"left out: {folder / 'a'} has no training step" in output and "left out: --config" in output
    assert f"left out: {folder / 'd'}: --optim.lr fast: give a number" in output
    assert output.count("as recipe, seed and index say") == 1
    shutil.rmtree(folder / "c")
    assert "none of these runs can be checked" in runs.capture(["audit", str(folder)], expect=2)


def test_another_data_set_is_named(finished, tmp_path):
    data = tmp_path / "data"
    runs.capture(
        ["synth", str(data), "--classes", "4", "--train-per-class", "8", "--val-per-class", "2", "--size", "64"]
    )
    runs.capture(["index", str(data)])
    output = runs.capture(["audit", str(finished), "--data_root", str(data)], expect=2)
    assert "is not the run's" in output and "--data_root" in output
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "is not the run's" in runs.capture(["audit", str(run), "--data_root", str(data)], expect=2)


def test_gaps_runs_that_follow_each_other_and_missing_data(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 4,' not in line))
    assert "has no rows of step 4, so" in runs.capture(["audit", str(run)], expect=2)
    (run / "metrics.jsonl").write_text("".join(lines + lines[3:]))
    assert "steps have repeats" in runs.capture(["audit", str(run)], expect=2)
    shutil.rmtree(run / "checkpoints")
    shutil.move(run / "metrics.jsonl", tmp_path / "rows")
    later = shutil.copytree(finished, tmp_path / "later")
    for kept, path in ((lambda step: step < 4, run), (lambda step: step >= 4, later)):  # as a run and its continuation
        rows = [row for row in map(json.loads, lines) if row["kind"] != "train" or kept(row["step"])]
        rows = rows if path == run else [{"kind": "event", "event": "continued", "step": 3}, *rows]
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no step in common" in runs.capture(["audit", str(run), str(later)])
    assert "--data_root" in runs.capture(["audit", str(run), "--data_root", str(tmp_path / "none")], expect=2)
    (run / "metrics.jsonl").unlink()
    assert "no training step" in runs.capture(["audit", str(run)], expect=2)
    assert "is not a run folder" in runs.capture(["audit", str(tmp_path / "none")], expect=2)


@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_a_ledger_without_its_beginning_is_named_by_the_resumed_run_and_by_audit(finished, root, tmp_path, how):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    if how == "emptied":
        (run / "metrics.jsonl").touch()
    options = [root, run, "--augment.mixup", "0.2", "--augment.random_erase", "0.5"]
    said = "metrics.jsonl has no rows of steps 1 to 8, and"
    assert runs.call(*options, "--train.max_steps", "9").count(said) == 1
    assert [row["step"] for row in runs.rows(run, "train")] == [9]
    assert runs.call(*options, "--train.max_steps", "10").count(said) == 1
    output = runs.capture(["audit", str(run), "--json", str(tmp_path / "found.json")], expect=2)
    assert "2 batches: as recipe, seed and index say" in output and "every batch" not in output
    assert "WRONG: the ledger has no rows of steps 1 to 8, so" in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["good"] and found["runs"][0]["lost"] == [[1, 8]]
    back = ["--resume", str(runs.checkpoint_at(run, 9)), "--train.max_steps", "10"]
    assert "going back to step 9" in runs.call(*options, *back)  # that does not make step 9 the run's beginning
    assert "no rows of steps 1 to 8, so" in runs.capture(["audit", str(run)], expect=2)


def test_a_ledger_without_its_end_is_named_by_audit_and_by_the_resumed_run(finished, root, tmp_path):
    """As an older copy of it, put back in its place."""
    run = shutil.copytree(finished, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 5))
    lost = "has no rows of steps 6 to 8, "
    assert f"WRONG: the ledger {lost}so" in runs.capture(["audit", str(run)], expect=2)
    drawn = ["--augment.mixup", "0.2", "--augment.random_erase", "0.5"]
    assert f"metrics.jsonl {lost}and" in runs.call(root, run, *drawn, "--train.max_steps", "9")
    assert f"WRONG: the ledger {lost}so" in runs.capture(["audit", str(run)], expect=2)


def test_stretches_of_lost_steps():
    def rows(*steps):
        return [{"kind": "train", "step": step} for step in steps]

    continued = {"kind": "event", "event": "continued", "step": 6}
    assert lost_steps(rows(1, 2, 3), 3) == lost_steps([continued, *rows(7, 8)], 8) == lost_steps([], 0) == []
    assert lost_steps(rows(2, 3, 6, 9), 10) == [(1, 1), (4, 5), (7, 8), (10, 10)]
    assert lost_steps(rows(1, 2, 5), 4) == [(3, 4)]
    assert lost_steps([continued], 8) == lost_steps([continued, *rows(9)], 8) == [(7, 8)]
    assert lost_steps([*rows(9), continued], 9) == [(7, 8)]
    words = "step 1, of steps 4 to 5, of steps 7 to 8 and 1 more stretch"
    assert lost_in_words(lost_steps(rows(2, 3, 6, 9), 10)) == words


def test_a_run_that_begins_with_another_runs_checkpoint_has_lost_nothing(finished, root, tmp_path):
    """By `--resume PATH` and by `continue`: also when it is resumed."""
    drawn = ["--augment.mixup", "0.2", "--augment.random_erase", "0.5"]
    resumed, continued = tmp_path / "resumed", tmp_path / "continued"
    begin = ["--resume", str(runs.checkpoint_at(finished, 8))]
    printed = runs.call(root, resumed, *drawn, *begin, "--train.max_steps", "9")
    printed += runs.call(root, resumed, *drawn, "--train.max_steps", "10")
    for steps in ("9", "10"):
        printed += runs.capture(
            ["continue", str(finished), "--epochs", "6", "--run_dir", str(continued), "--train.max_steps", steps]
        )
    assert "no rows of" not in printed
    output = runs.capture(["audit", str(resumed), str(continued)])
    assert output.count("steps 9 to 10, ") == 2 and output.count("every batch") == 2


def test_an_image_that_was_unreadable_only_once_is_no_other_batch(root, tmp_path):
    """The disk refused sample A; the start was killed, the next one has read A, in one batch with B, which is damaged
    for good. The ledger names both."""
    data, run = shutil.copytree(root, tmp_path / "data"), tmp_path / "run"
    index = open_sound(data / "index")
    plan = make_train_plan(
        index, *(getattr(load_config(str(runs.TINY)), name) for name in ("data", "train", "augment"))
    )
    second = [plan.samples_at(step, 0, 20)[0].tolist() for step in (5, 6)]  # of the second epoch
    bad, once = second[0][3], second[0][8]
    index.splits["train"].path(bad).write_bytes(b"damaged")
    runs.call(data, run, "--train.max_steps", "5")
    (event,) = [row for row in runs.rows(run, "event") if row["event"] == TRAINING_UNREADABLE]
    assert event["sample"] == bad
    with (run / "metrics.jsonl").open("a") as ledger:
        ledger.write(json.dumps(event | {"step": 6, "sample": once}) + "\n")
    runs.call(data, run, "--train.max_steps", "7")
    output = runs.capture(["audit", str(run)])
    assert "every batch" in output and "2 of them with substitutes" in output
    edit(run, 6, batch_digest=runs.rows(run, "train")[0]["batch_digest"])
    assert "the first at step 6" in runs.capture(["audit", str(run)], expect=2)
