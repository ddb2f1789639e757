"""NaN and infinite values: skipped on all ranks, then the run rolls back, then it stops; and resuming repeats it."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch

from pipeline.config import GuardConfig
from pipeline.dataset.index.index import open_index
from pipeline.errors import TransientError, UserError
from pipeline.loader.plan import TrainPlan
from pipeline.tracking.ledger import Ledger
from pipeline.training.data import check_labels
from pipeline.training.guard import Guard, Rollback, Spikes, is_in_history
from pipeline.training.ranks.consistency import bit_sum
from pipeline.training.ranks.step_stats import StepStats, Vote
from pipeline.training.recorder import SPIKE_WARNING_STEPS, RunRecorder
from pipeline.training.step import TrainStep

TINY = ["--model.name", "shufflenet_v2_x0_5", "--model.zero_init_residual", "false"]
#: the first update throws the weights far out, and from the second on no loss is a number: going back heals it
EXPLODING = [*TINY, "--optim.lr", "1e30", "--schedule.warmup_epochs", "0", "--guard.rollback_reshuffle"]
EXPLODING += ["--guard.rollback_lr_factor", "1e-32"]
OTHER_ORDER = ["--guard.max_skipped", "2", "--guard.rollback_reshuffle"]


def stats(step, loss=1.0, norm=1.0, scale=1.0):
    return StepStats(step, loss, 0.0, norm, scale, Vote.NONE, 0.0, 1.0, torch.zeros(1, dtype=torch.int64))


def events(run, name):
    return [row for row in runs.rows(run, "event") if row["event"] == name]


@contextlib.contextmanager
def failing_at(*steps):
    """The loss is not a number in each of these steps, the first time that it is done."""
    left, call = set(steps), TrainStep.__call__

    def broken(train_step, batch, lr, step=0):
        if step + 1 not in left:
            return call(train_step, batch, lr, step)
        left.remove(step + 1)
        loss, train_step.loss = train_step.loss, lambda *given: loss(*given) * math.nan
        try:
            return call(train_step, batch, lr, step)
        finally:
            train_step.loss = loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", broken)
        yield


@pytest.fixture(scope="module")
def healed(root, tmp_path_factory):
    """A run that went back once, and on to step 12."""
    run = tmp_path_factory.mktemp("healed") / "run"
    output = runs.call(root, run, *EXPLODING, "--train.max_steps", "12", "--guard.max_skipped", "4")
    return run, output


def test_goes_back_after_bad_steps_in_a_row_and_heals(healed):
    run, output = healed
    assert "every batch" in runs.capture(["audit", str(run)])
    (event,) = events(run, "rolled_back")
    assert event["to"] == 0 and event["lr_factor"] == 1e-32
    assert "update skipped" in output and "rolling back from step" in output and "to the beginning" in output
    rows = runs.rows(run, "train")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(isinstance(row["loss"], float) and "skipped" not in row for row in rows)
    assert rows[0]["lr"] == pytest.approx(0.01)
    assert json.loads((run / "finished").read_text())["step"] == 12


@pytest.mark.parametrize("cut", [3, 7])
def test_resuming_repeats_the_way_back(root, healed, tmp_path, cut):
    """Stopped among the bad steps (3), or after the run went back (7): the same rows, the same bits."""
    run, options = tmp_path / "run", [*EXPLODING, "--guard.max_skipped", "4"]
    runs.call(root, run, *options, "--train.max_steps", str(cut))
    assert len(events(run, "rolled_back")) == (cut > 5)
    runs.call(root, run, *options, "--train.max_steps", "12")
    assert runs.repeatable(run) == runs.repeatable(healed[0])
    runs.assert_same_state(runs.checkpoint_at(run, 12), runs.checkpoint_at(healed[0], 12))


def test_a_checkpoint_of_the_way_given_up_is_not_taken(root, healed, tmp_path):
    """Killed between the ledger's entry and the removal of later checkpoints."""
    run = tmp_path / "run"
    options = [*EXPLODING, "--guard.max_skipped", "4"]
    runs.call(root, run, *options, "--train.max_steps", "3")
    given_up = runs.checkpoint_at(run, 3)
    assert given_up.exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(events(healed[0], "rolled_back")[0]) + "\n")
    runs.call(root, run, *options, "--train.max_steps", "12")
    assert runs.repeatable(run) == runs.repeatable(healed[0])


def test_stops_when_going_back_does_not_help(root, tmp_path):
    run = tmp_path / "run"
    options = [*EXPLODING[:-2], "--guard.max_rollbacks", "1", "--guard.max_skipped", "3"]
    output = runs.call(root, run, *options, expect=1)
    lines = [line for line in output.splitlines() if line.startswith("pipeline train: ")]
    assert len(lines) == 1 and "rollbacks so far: 1 of 1" in lines[0] and "--optim.lr" in lines[0]
    assert json.loads((run / "failed").read_text())["exit_code"] == 1 and not (run / "interrupted").exists()


@pytest.mark.slow
def test_nan_in_one_ranks_gradient_is_left_out_by_all(root, tmp_path):
    """The skipped step leaves weights, momentum and BatchNorm as they were on both ranks; the run goes on."""
    run = tmp_path / "run"
    options = ["--train.max_steps", "5", "--checkpoint.every_steps", "1", "--checkpoint.keep", "9"]
    options += ["--guard.compare_every_steps", "1"]
    runs.train(root, run, *TINY, *options, processes=2, program=["-m", "tests.inject", "nan", "1", "2"])
    rows = runs.rows(run, "train")
    assert [row.get("skipped", False) for row in rows] == [False, False, True, False, False]
    assert rows[2]["grad_norm"] == "nan" and math.isfinite(rows[2]["loss"])
    assert not runs.checkpoint_at(run, 3).exists()  # not saved among bad steps
    final = torch.load(runs.checkpoint_at(run, 5) / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in final.values())


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_named(root, tmp_path):
    run = tmp_path / "run"
    options = ["--train.max_steps", "9", "--guard.compare_every_steps", "4", "--checkpoint.every_steps", "1"]
    output = runs.train(root, run, *options, processes=2, program=["-m", "tests.inject", "flip", "1", "2"], expect=1)
    assert "ranks 0 and 1 differ in " in output and "weight" in output
    assert [step for step, _ in runs.list_checkpoints(run / "checkpoints")] == [2, 1]


def test_fp16_may_look_for_its_scale_but_not_for_ever():
    guard = Guard(GuardConfig(max_skipped=2), "fp16")
    for step in range(1, 11):
        assert guard.observe(stats(step, norm=math.inf, scale=2.0 ** (11 - step))) is None
    assert "loss scale 0.5" in guard.observe(stats(11, norm=math.inf, scale=0.5))
    guard.observe(stats(12, norm=math.inf, scale=0.25))
    assert guard.tripped == 10


def test_stop_means_stop():
    with pytest.raises(TransientError, match=r"step 8: the loss is nan.*--optim.lr"):
        Guard(GuardConfig(nonfinite="stop"), "bf16").observe(stats(8, loss=math.nan))


def test_a_good_step_ends_the_row():
    guard = Guard(GuardConfig(max_skipped=3), "bf16")
    for step, loss in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan, 1.0], 1):
        guard.observe(stats(step, loss=loss))
    assert guard.tripped is None


def test_history_decides_rate_and_checkpoints():
    guard = Guard(GuardConfig(rollback_lr_factor=0.5, rollback_reshuffle=True), "bf16")
    guard.roll_back(30, 20)
    guard.roll_back(90, 80)
    assert [guard.lr_factor(step) for step in (19, 20, 79, 80)] == [1, 0.5, 0.5, 0.25]
    assert guard.reshuffled_from() == [20, 80]
    first = [30, 20, 0.5, True]
    known = guard.rollbacks
    assert known[0] == Rollback(*first)
    assert is_in_history({"step": 20}, known) and not is_in_history({"step": 25}, known)
    assert is_in_history({"step": 80, "rollbacks": [first]}, known)
    assert not is_in_history({"step": 81, "rollbacks": [first]}, known)


def test_another_order_still_shows_every_sample_once_an_epoch():
    sizes = np.full(100, 64)
    plan, other = (TrainPlan(sizes, sizes, 8, seed=1) for _ in range(2))
    other.reshuffle([5, 17])  # 40 into epoch 0, 36 into epoch 1
    for epoch, place in ((0, 40), (1, 36)):
        before, after = plan.permutation(epoch), other.permutation(epoch)
        assert (before[:place] == after[:place]).all() and (before[place:] != after[place:]).any()
        assert sorted(after) == list(range(100))
    assert (plan.permutation(2) == other.permutation(2)).all()


def test_spikes_are_those_far_above_the_median():
    spikes = Spikes(2.0, [5.0] * 19)
    assert not spikes.observe(20.0)  # too few to judge by
    assert not spikes.observe(9.9) and spikes.observe(10.1) and not spikes.observe(math.nan)


def test_a_loss_that_jumps_all_the_time_is_said_now_and_then():
    said = []
    recorder = SimpleNamespace(next_spike_warning=0, console=SimpleNamespace(warn=said.append))
    for step in range(1, 3 * SPIKE_WARNING_STEPS + 1):
        RunRecorder.warn_of_spike(recorder, step, 9.0)
    assert len(said) == 3 and said[0] == "step 1: the loss jumped to 9.000"


def test_spikes_are_judged_by_the_ledger_after_a_resume(tmp_path):
    """The same rows are marked whether a run was cut or not."""
    ledger = Ledger(tmp_path / "metrics.jsonl", step=0)
    for step in range(1, 31):
        ledger.append({"kind": "train", "step": step, "loss": math.nan if step == 7 else 5.0 - step / 10})
    ledger.close()
    resumed = Spikes(2.0, Ledger(tmp_path / "metrics.jsonl", step=24).losses)
    assert list(resumed.losses) == [5.0 - step / 10 for step in range(1, 25) if step != 7]
    assert resumed.observe(9.0)


def test_a_label_out_of_range_is_named_with_its_file(root):
    index = open_index(root / "index")
    with pytest.raises(
        UserError, match=r"n\d+_\d+.*JPEG has label 3, the model has classes 0 to 2 \(24 such samples\)"
    ):
        check_labels(index, 3)
    check_labels(index, 4)


def test_a_run_begun_with_another_runs_checkpoint_does_not_roll_back_to_new_weights(root, tmp_path):
    """It fails before it has saved anything."""
    runs.call(root, tmp_path / "first", *TINY, "--train.max_steps", "3")
    there, run = runs.checkpoint_at(tmp_path / "first", 3), tmp_path / "run"
    with failing_at(4, 5, 6):
        output = runs.call(root, run, *TINY, *OTHER_ORDER, "--resume", str(there), "--train.max_steps", "9")
    assert f"rolling back from step 5 to {runs.checkpoint_at(run, 3)}" in output
    assert [event["to"] for event in events(run, "rolled_back")] == [3]
    assert [row["step"] for row in runs.rows(run, "train")] == list(range(4, 10))


def test_rollbacks_of_the_run_that_is_continued_stay_in_force(root, tmp_path):
    """Also after the new run has rolled back itself, and was started again: the same rates, orders and batches."""
    old, run, whole = tmp_path / "old", tmp_path / "run", tmp_path / "whole"
    with failing_at(4, 5):
        runs.call(root, old, *TINY, *OTHER_ORDER, "--train.max_steps", "6")
    options = ["continue", str(old), "--epochs", "3", "--rate", "restart", "--run_dir"]
    with failing_at(8, 9):
        runs.capture([*options, str(whole)])
    assert [event["to"] for event in events(whole, "rolled_back")] == [6]
    with failing_at(8, 9):
        runs.capture([*options, str(run), "--train.max_steps", "9"])
    runs.capture([*options, str(run)])
    assert runs.repeatable(run) == runs.repeatable(whole)
    assert "every batch" in runs.capture(["audit", str(run)])


def test_going_back_before_a_rollback_gives_it_up(root, tmp_path):
    """By --resume of an older checkpoint: the run is then as if it had not rolled back, with all rollbacks left."""
    run, options = tmp_path / "run", [*TINY, *OTHER_ORDER, "--checkpoint.every_steps", "2", "--checkpoint.keep", "9"]
    runs.call(root, tmp_path / "whole", *options, "--train.max_steps", "8")
    with failing_at(5, 6):
        runs.call(root, run, *options, "--train.max_steps", "8")
    assert [event["to"] for event in events(run, "rolled_back")] == [4]
    runs.call(root, run, *options, "--train.max_steps", "8", "--resume", str(runs.checkpoint_at(run, 2)))
    assert not events(run, "rolled_back") and len(events(next(run.glob("set-aside-*")), "rolled_back")) == 1
    assert runs.repeatable(run) == runs.repeatable(tmp_path / "whole")
    assert "every batch" in runs.capture(["audit", str(run)])


def test_the_checkpoint_that_a_rollback_requires_is_kept(root, tmp_path):
    """Stopped again and again among bad steps, with few checkpoints kept."""
    run = tmp_path / "run"
    options = [*TINY, "--guard.max_skipped", "4", "--checkpoint.every_steps", "3", "--checkpoint.keep", "1"]
    for stop in (5, 6, 9):
        with failing_at(5, 6, 7, 8):
            runs.call(root, run, *options, "--train.max_steps", str(stop))
    assert [event["to"] for event in events(run, "rolled_back")] == [3]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5, 5)])
def test_a_flipped_bit_changes_the_sum_of_a_parameter_of_any_type(kind, shape):
    weight = torch.ones(shape, dtype=kind)
    before = bit_sum(weight)
    weight.flatten().view(torch.uint8)[1] ^= 4
    assert bit_sum(weight) != before


def test_stopped_at_the_last_bad_step_it_rolls_back_at_the_next_start():
    config = GuardConfig(max_skipped=3)
    whole, resumed = Guard(config, "bf16"), Guard(config, "bf16")
    for step in (8, 9, 10):
        whole.observe(stats(step, loss=math.nan))
    assert whole.tripped == 7
    resumed.restore([], whole.state()["last_good_step"], 10)
    assert resumed.tripped == 7
    resumed.restore([], 7, 9)
    assert resumed.tripped is None
