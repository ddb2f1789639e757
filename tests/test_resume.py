"""A run that is killed anywhere goes on anywhere, bit for bit, and its ledger proves what it saw."""

import json
import signal

import pytest
import runs
import yaml

from pipeline.config import parse_config
from pipeline.dataset.index.scan import build_index
from pipeline.loader.plan import make_train_plan

STEPS = 19  # 4 epochs of 96 images in batches of 20; epochs are full after 5, 10, 15 and 20 steps


def how(precision, processes):
    """The options of a run. One kind of them exchanges compressed gradients, in several buckets. Those in bf16 have
    small images, as many CPUs have no instructions for it; not of 16 px (docs/train.md says why)."""
    exchange = ["--train.compress_gradients", "bf16", "--train.bucket_mb", "5"]
    small = [
        "--data.image_size",
        "20",
        "--data.val_size",
        "20",
        "--data.val_resize",
        "24",
    ]  # see test_everything: not 16
    more = {("fp32", 2): exchange, ("bf16", 1): small, ("bf16", 2): small}
    return ["--train.precision", precision, *more.get((precision, processes), [])]


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    """The run folder of an uninterrupted run, made once for each (precision, processes)."""
    made = {}

    def get(precision, processes):
        key = precision, processes
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed") / f"{precision}-{processes}"
            runs.train(root, made[key], *how(precision, processes), processes=processes)
        return made[key]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_twice_and_resumed_is_bit_identical(root, undisturbed, tmp_path, precision, processes):
    whole, cut = undisturbed(precision, processes), tmp_path / "cut"
    options = how(precision, processes)
    runs.kill_once_saved(3, root, cut, *options, "--checkpoint.every_steps", "3", processes=processes)
    runs.kill_once_saved(10, root, cut, *options, "--checkpoint.every_epoch", "true", processes=processes)
    runs.train(root, cut, *options, processes=processes)

    resumed = [row["step"] for row in runs.rows(cut, "event") if row["event"] == "resumed"]
    assert resumed[0] % 3 == 0 and resumed[0] not in (0, 5, 10, 15)  # inside an epoch
    assert resumed[1] in (10, 15)  # at an epoch's border
    assert [row["step"] for row in runs.rows(cut, "train")] == list(range(1, STEPS + 1))
    assert runs.repeatable(cut) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(cut, STEPS), runs.checkpoint_at(whole, STEPS))
    scores = [[{k: row[k] for k in row} for row in runs.rows(run, "eval")] for run in (cut, whole)]
    assert scores[0] == scores[1]


@pytest.mark.long
def test_four_ranks_with_accumulation_resume_bit_identically(root, tmp_path):
    """With more than two ranks the order of a sum depends on the gradient buckets' layout, which must not depend on
    where the run was resumed."""
    options = ["--train.micro_batch_size", "3", "--checkpoint.every_steps", "2", "--train.max_steps", "8"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.train(root, whole, *options, processes=4)
    runs.train(root, cut, *options[:-1], "4", processes=4)
    runs.train(root, cut, *options, processes=4)
    assert runs.repeatable(cut) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(cut, 8), runs.checkpoint_at(whole, 8))


@pytest.mark.long
def test_elastic_two_one_two_ranks_see_the_same_batches(root, undisturbed, tmp_path):
    run = tmp_path / "run"

    def has(steps):
        return lambda: len(runs.rows(run, "train")) >= steps

    code, output = runs.stop_when(has(5), signal.SIGTERM, root, run, processes=2)
    assert json.loads((run / "interrupted").read_text())["reason"] == "SIGTERM", output
    code, output = runs.stop_when(has(11), signal.SIGUSR1, root, run)
    assert code == 75 and "run the same command to resume" in output
    runs.train(root, run, processes=2)
    worlds = [row["world_size"] for row in runs.rows(run, "event") if "world_size" in row]
    assert worlds == [2, 1, 2]
    digests = [row["batch_digest"] for row in runs.rows(run, "train")]
    assert digests == [row["batch_digest"] for row in runs.rows(undisturbed("fp32", 2), "train")]

    config = parse_config(["--config", str(runs.TINY)])
    plan = make_train_plan(build_index(root), config.data, config.train)
    planned = [plan.samples_at(step, 0, 20)[:2] for step in range(STEPS)]
    assert digests == [plan.digest(step, ids) for step, (ids, _) in enumerate(planned)]
    seen = [(int(epoch), int(i)) for ids, epochs in planned for i, epoch in zip(ids, epochs, strict=True)]
    for epoch in range(3):
        assert sorted(i for e, i in seen if e == epoch) == list(range(plan.samples))


def test_a_finished_run_says_so(root, undisturbed):
    run = undisturbed("fp32", 2)
    before = (run / "metrics.jsonl").read_bytes()
    output = runs.train(root, run, *how("fp32", 2))
    assert "already finished" in output
    assert (run / "metrics.jsonl").read_bytes() == before
    assert json.loads((run / "finished").read_text())["step"] == STEPS


def test_the_loop_learns(undisturbed):
    run = undisturbed("fp32", 2)
    losses = [row["loss"] for row in runs.rows(run, "train")]
    assert sum(losses[-4:]) / 4 < 0.75 * sum(losses[:4]) / 4
    assert runs.rows(run, "eval")[-1]["val_top1"] > 60  # chance: 25 %


def test_the_run_folder_holds_what_the_design_says(undisturbed):
    run = undisturbed("fp32", 2)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["name"] == "resnet18"
    row = runs.rows(run, "train")[-1]
    expected = [
        "step",
        "epoch",
        "loss",
        "top1",
        "lr",
        "images_per_s",
        "data_wait_fraction",
        "grad_norm",
        "batch_digest",
    ]
    assert row.keys() == {"kind", *expected}
    assert 0 <= row["data_wait_fraction"] <= 1 and row["images_per_s"] > 0 and row["epoch"] == STEPS * 20 / 96
    score = runs.rows(run, "eval")[-1]
    assert score["images"] == 24 and 0 <= score["val_top1"] <= score["val_top5"] <= 100
    leftovers = {path.name for path in run.iterdir()} - {"config.yaml", "metrics.jsonl", "checkpoints", "finished"}
    assert not leftovers
