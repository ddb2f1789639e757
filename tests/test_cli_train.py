"""What `train` and `evaluate` answer to bad input, as a user meets it: one clear line and an exit code."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import runs

from pipeline.__main__ import main
from pipeline.dataset.index.scan import build_index
from pipeline.run_paths import list_checkpoints
from pipeline.training.run_folder.manifest import verify_checkpoint


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A finished run of 6 steps with a checkpoint every 2."""
    run = tmp_path_factory.mktemp("finished") / "run"
    runs.call(root, run, "--train.max_steps", "6", "--checkpoint.every_steps", "2", "--checkpoint.keep", "3")
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def complaint(output: str) -> str:
    """The one line that tells the user what to mend; there is no traceback beside it (but torchrun's own)."""
    lines = [line for line in output.splitlines() if line.startswith("pipeline train: ")]
    assert len(lines) == 1 and "Traceback" not in output.split("torch/distributed/elastic")[0], output
    return lines[0]


def test_no_such_data_root(tmp_path):
    line = complaint(runs.call(tmp_path / "nowhere", tmp_path / "run", expect=2))
    assert f"data root {tmp_path}/nowhere does not exist" in line


def test_an_empty_class_folder(tmp_path, root):
    data = shutil.copytree(root / "ILSVRC/Data/CLS-LOC", tmp_path / "data")
    (data / "train" / "n99999999").mkdir()
    line = complaint(runs.call(data, tmp_path / "run", expect=2))
    assert "n99999999 holds no image" in line


def test_an_unwritable_run_folder(root, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = complaint(runs.call(root, tmp_path / "file" / "run", expect=2))
    assert f"run folder {tmp_path}/file/run can't be written" in line and "--run_dir" in line


def test_a_batch_that_the_ranks_cannot_share(root, tmp_path):
    output = runs.train(root, tmp_path / "run", "--train.global_batch_size", "21", processes=2, expect=1)
    assert "--train.global_batch_size 21 is not divisible by the 2 ranks; give a multiple, e.g. 22" in complaint(output)


def test_a_typo_is_said_once_however_many_ranks(root, tmp_path):
    output = runs.train(root, tmp_path / "run", "--optm.lr", "0.1", processes=2, expect=1)
    assert "--optm.lr" in complaint(output)


def test_a_run_folder_of_another_recipe(root, run):
    line = complaint(runs.call(root, run, "--optim.lr", "0.3", "--model.name", "resnet34", expect=2))
    assert "optim.lr is 0.05 in the run folder, and 0.3 is asked for" in line
    assert "model.name is resnet18 in the run folder, and resnet34 is asked for" in line


def test_a_piece_of_one_image_and_one_pixel(root, tmp_path):
    line = complaint(runs.call(root, tmp_path / "run", "--train.micro_batch_size", "19", expect=2))
    assert "--train.micro_batch_size 19 leaves one image of the 20 of a rank to itself" in line and "32 px" in line


def test_synchronised_batchnorm_is_for_gpus(root, tmp_path):
    line = complaint(runs.call(root, tmp_path / "run", "--model.sync_batchnorm", "--train.device", "cpu", expect=2))
    assert "--model.sync_batchnorm requires GPUs" in line


def test_images_too_small_for_the_network_leave_the_folder_free_for_the_right_size(root, tmp_path):
    folder, network = (
        tmp_path / "run",
        ["--model.name", "alexnet", "--model.zero_init_residual", "false", "--train.max_steps", "1"],
    )
    line = complaint(runs.call(root, folder, *network, "--data.image_size", "32", expect=2))
    assert "--data.image_size 32: alexnet can't take such images; give at least 63" in line
    line = complaint(runs.call(root, folder, "--model.num_classes", "2", expect=2))  # found when the folder is there
    assert "--model.num_classes 2" in line and (folder / "config.yaml").exists()
    runs.call(root, folder, *network, "--data.image_size", "64", "--data.val_size", "64", "--data.val_resize", "64")


def test_a_run_folder_of_another_data_set(root, run, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    image = next((data / "ILSVRC/Data/CLS-LOC/train").glob("*/*"))
    image.unlink()
    assert "was trained on another data set" in complaint(runs.call(data, run, expect=2))


def test_never_refuses_where_there_are_checkpoints(root, run):
    assert "--resume never" in complaint(runs.call(root, run, "--resume", "never", expect=2))


def test_flipped_bytes_in_the_newest_checkpoint(root, run, finished):
    """The one before it is used, and the run ends in the same bits."""
    model = runs.checkpoint_at(run, 6) / "model.pt"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 255
    model.write_bytes(data)
    output = runs.call(root, run, "--train.max_steps", "6")
    assert "step-000000006: model.pt has other bytes than were written; using the one before it" in output
    assert "resuming from" in output and "step-000000004" in output
    runs.assert_same_state(runs.checkpoint_at(run, 6), runs.checkpoint_at(finished, 6))


def test_resume_from_a_named_checkpoint(root, finished, tmp_path):
    path = runs.checkpoint_at(finished, 4)
    run = tmp_path / "run"
    runs.call(root, run, "--resume", str(path), "--train.max_steps", "6")
    runs.assert_same_state(runs.checkpoint_at(run, 6), runs.checkpoint_at(finished, 6))
    line = complaint(runs.call(root, run, "--resume", str(tmp_path / "none"), expect=2))
    assert str(tmp_path / "none") in line


def test_more_steps_go_on_from_a_finished_run(root, run):
    output = runs.call(root, run, "--train.max_steps", "8")
    assert "step-000000006" in output
    assert [row["step"] for row in runs.rows(run, "train")] == list(range(1, 9))


def test_an_image_truncated_after_indexing_is_substituted(root, tmp_path):
    """The run goes on; two ranks and a later resume by one agree on the blacklist and on every batch."""
    data = shutil.copytree(root, tmp_path / "data")
    index = build_index(data)
    path = index.splits["train"].path(7)
    path.write_bytes(path.read_bytes()[:500])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output = runs.train(data, whole, "--train.max_steps", "12", processes=2)
    assert output.count("unreadable from now on") == 1 and path.name in output
    blacklist = verify_checkpoint(runs.checkpoint_at(whole, 12))["blacklist"]
    assert [sample for sample, _ in blacklist] == [7]
    runs.train(data, cut, "--train.max_steps", "8", processes=2)
    runs.call(data, cut, "--train.max_steps", "12")
    digests = [[row["batch_digest"] for row in runs.rows(run, "train")] for run in (whole, cut)]
    assert digests[0] == digests[1]
    assert verify_checkpoint(runs.checkpoint_at(cut, 12))["blacklist"] == blacklist
    (event,) = [row for row in runs.rows(whole, "event") if row["event"] == "training_unreadable"]
    assert event["sample"] == 7 and path.name in event["file"] and [7, event["step"]] in blacklist
    audited = runs.capture(["audit", str(whole), str(cut)])
    assert "substitutes for unreadable images" in audited and "the same batches, steps 1 to 12" in audited


def test_a_loss_that_is_no_number_stops_and_saves_nothing(root, tmp_path):
    options = ["--checkpoint.every_steps", "1", "--guard.nonfinite", "stop"]
    output = runs.call(root, tmp_path / "run", "--optim.lr", "1e18", *options, expect=1)
    line = complaint(output)
    assert "the loss is" in line and "--optim.lr" in line
    assert json.loads((tmp_path / "run" / "failed").read_text())["exit_code"] == 1
    _, newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    weights = runs.torch.load(newest / "model.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())


def test_the_stop_file_saves_and_goes(root, tmp_path):
    """What a batch script writes when the time limit nears."""
    run = tmp_path / "run"

    def started() -> bool:
        if len(runs.rows(run, "train")) >= 2:
            (run / "stop").write_text("time limit\n")
            return (run / "interrupted").exists()
        return False

    runs.stop_when(started, signal.SIGCONT, root, run, "--train.max_steps", "1000000", "--schedule.epochs", "100000")
    marker = json.loads((run / "interrupted").read_text())
    assert marker["reason"] == "time limit" and marker["step"] == runs.rows(run, "train")[-1]["step"]
    assert verify_checkpoint(runs.checkpoint_at(run, marker["step"]))


def test_evaluate_scores_the_best_checkpoint(finished, tmp_path):
    scores = tmp_path / "scores.json"
    command = [sys.executable, "-m", "pipeline", "evaluate", str(finished), "--json", str(scores)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recorded = runs.rows(finished, "eval")[-1]
    found = json.loads(scores.read_text())
    assert (found["step"], found["images"], found["val_top1"]) == (6, 24, recorded["val_top1"])
    assert found["val_loss"] == pytest.approx(recorded["val_loss"], rel=1e-6)
    done = subprocess.run([*command[:4], str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "is not a run folder" in done.stderr


def test_a_hang_timeout_of_centuries_is_none(root, tmp_path):
    """It overflowed: a traceback, or ranks that never met."""
    output = runs.call(root, tmp_path / "run", "--train.max_steps", "1", "--train.hang_timeout_s", "1e300")
    assert "finished: 1 step," in output


def test_a_failure_that_nobody_foresaw_is_marked_as_well(root, tmp_path, monkeypatch):
    def fail(setup):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("pipeline.training.loop.train", fail)
    with pytest.raises(ZeroDivisionError):
        main(runs.command(root, tmp_path / "run")[3:])
    marker = json.loads((tmp_path / "run/failed").read_text())
    assert (marker["exit_code"], marker["message"]) == (1, "ZeroDivisionError: division by zero")
