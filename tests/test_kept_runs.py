"""What a run has done is kept: through mistaken starts, moved and copied folders, returns to older checkpoints."""

import errno
import shutil

import pytest
import runs
import yaml

from pipeline.config import TrackingConfig
from pipeline.errors import UserError
from pipeline.tracking.wandb_view import WandbView
from pipeline.training import setup
from pipeline.training.run_folder import checkpoint
from pipeline.training.start import named_checkpoint

SAVING = ["--checkpoint.every_steps", "2", "--checkpoint.keep", "9", "--train.max_steps", "6"]


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run that has done its 6 steps, with checkpoints at 2, 4 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    runs.call(root, run, *SAVING)
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def steps(folder, kind="train"):
    return [row["step"] for row in runs.rows(folder, kind)]


def saved(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


MISTAKES = [
    ["--optim.lr", "0.01"],
    ["--train.max_steps", "4"],
    ["--data.root", "nowhere"],
    ["--resume", "nowhere"],
    ["--resume", "never"],
    ["--model.num_classes", "2"],
]


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=" ".join)
def test_a_refused_start_leaves_a_run_as_it_was(root, run, mistake, state):
    """Its marker, its settings, its ledger and its checkpoints."""
    if state == "interrupted":
        (run / "finished").rename(run / "interrupted")

    def kept():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}

    before = kept()
    runs.call(root, run, *SAVING, *mistake, expect=2)
    assert kept() == before


def test_a_stop_while_a_finished_run_is_looked_at_leaves_it_finished(root, run, monkeypatch):
    def stopped(*_, stop, **__):
        stop.ask("SIGTERM")
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "open_data", stopped)
    before = (run / "finished").read_bytes()
    runs.call(root, run, *SAVING, expect=75)
    assert (run / "finished").read_bytes() == before and not (run / "interrupted").exists()


def test_a_finished_run_without_checkpoints_is_not_trained_again(root, run):
    shutil.rmtree(run / "checkpoints")
    ledger = (run / "metrics.jsonl").read_bytes()
    assert "already finished" in runs.call(root, run, *SAVING)
    assert (run / "metrics.jsonl").read_bytes() == ledger and saved(run) == []


def test_a_run_whose_checkpoints_could_not_be_written_is_not_called_finished(root, tmp_path, monkeypatch):
    """The disk is full: its last step is scored, and no weights are left."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "write_checkpoint", refuse)
        message = runs.call(root, run, "--train.max_steps", "2", expect=1).splitlines()[-1]
    assert "last checkpoint could not be written" in message
    assert message.endswith("(No space left on device); free some space and start again")
    assert steps(run, "eval") == [2] and saved(run) == []
    assert "has no checkpoint" in runs.call(root, run, "--train.max_steps", "2", expect=2)
    assert not (run / "finished").exists()


def test_a_run_that_was_killed_before_its_end_was_noted_is_noted_as_finished(root, run):
    """Else `pipeline continue` refused it: not finished."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"finished"' not in line))
    for _ in range(2):
        assert "already finished" in runs.call(root, run, *SAVING)
        assert [row["step"] for row in runs.rows(run, "event") if row["event"] == "finished"] == [6]


def test_an_interrupted_run_without_checkpoints_is_refused(root, run):
    shutil.rmtree(run / "checkpoints")
    ledger = (run / "metrics.jsonl").read_bytes()
    printed = runs.call(root, run, *SAVING[:-1], "9", expect=2)
    assert "records 6 steps" in printed and "--run_dir" in printed
    assert (run / "metrics.jsonl").read_bytes() == ledger


@pytest.mark.parametrize("file", ["model.pt", "meta.json"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(root, run, file):
    """Its ledger would be emptied. And it is not continued, nor is a folder begun for that."""
    for _, path in runs.list_checkpoints(run / "checkpoints"):
        (path / file).write_bytes(b"damaged")
    ledger = (run / "metrics.jsonl").read_bytes()
    message = runs.call(root, run, "--train.max_steps", "8", expect=2).splitlines()[-1]
    assert f"run folder {run} has no undamaged checkpoint" in message and "--run_dir" in message
    message = runs.capture(["continue", str(run), "--epochs", "9"], expect=2).splitlines()[-1]
    assert file in message and str(run) in message
    assert (run / "metrics.jsonl").read_bytes() == ledger
    assert not (run.parent / "run-to-9/metrics.jsonl").exists()


def test_going_back_sets_later_steps_aside_and_the_ledger_has_no_hole(root, run):
    back = ["--resume", str(run / "checkpoints/step-000000002")]
    printed = runs.call(root, run, *SAVING[:-1], "3", *back)
    aside = run / "set-aside-after-step-000000002"
    assert str(aside) in printed and "2 later checkpoints" in printed
    assert saved(aside) == [4, 6] and steps(aside) == [3, 4, 5, 6]
    assert saved(run) == [2, 3] and steps(run) == [1, 2, 3]
    runs.call(root, run, *SAVING)
    assert steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("step", [4, 2])
def test_another_runs_checkpoint_in_the_folder_of_a_run_sets_that_one_aside(root, run, tmp_path, step):
    """Its steps are not those before the checkpoint's: its score could be called the best, and steps be missed."""
    other = tmp_path / "other"
    runs.call(root, other, *SAVING[:-1], "2", "--train.micro_batch_size", "10")  # no copy of `run`
    before = (runs.checkpoint_at(other, 2) / "optimizer.pt").read_bytes()
    begin = ["--resume", str(runs.checkpoint_at(run, step))]
    printed = runs.call(root, other, *SAVING[:-1], "5", *begin)
    aside = other / "set-aside-after-step-000000000"
    assert str(aside) in printed and saved(aside) == [2] and steps(aside) == [1, 2]
    assert (runs.checkpoint_at(aside, 2) / "optimizer.pt").read_bytes() == before
    assert steps(other) == list(range(step + 1, 6)) and saved(other)[0] == step
    assert "every batch" in runs.capture(["audit", str(other)])
    assert "set-aside" not in runs.call(root, other, *SAVING, *begin) and steps(other)[-1] == 6


def test_the_original_of_a_copied_run_is_its_own_checkpoint(root, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    runs.call(root, copy, *SAVING[:-1], "5", "--resume", str(runs.checkpoint_at(run, 4)))
    assert steps(copy) == [1, 2, 3, 4, 5] and saved(copy) == [2, 4, 5]
    assert saved(copy / "set-aside-after-step-000000004") == [6]


@pytest.mark.parametrize("named", ["the link", "its target"])
def test_a_checkpoint_of_the_run_is_not_written_again_where_checkpoints_is_a_link(root, run, tmp_path, named):
    shutil.move(run / "checkpoints", tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    path = (run / "checkpoints" if named == "the link" else tmp_path / "large") / "step-000000002"
    before = path.stat().st_ino
    runs.call(root, run, *SAVING[:-1], "2", "--resume", str(path))
    assert saved(run) == [2] and steps(run, "eval") == [2] and path.stat().st_ino == before


def test_good_checkpoints_are_not_pruned_in_favor_of_later_damaged_ones(root, run):
    """They are as many as `checkpoint.keep`, and newer than what the resumed run saves."""
    for step in (4, 6):
        (runs.checkpoint_at(run, step) / "model.pt").write_bytes(b"damaged")
    options = ["--checkpoint.every_steps", "2", "--checkpoint.keep", "2", "--train.eval_every_epochs", "100"]
    runs.call(root, run, *options, "--train.max_steps", "3")
    assert saved(run) == [2, 3]
    aside = run / "set-aside-after-step-000000002"
    assert saved(aside) == [4, 6] and steps(aside) == [3, 4, 5, 6]
    assert "set-aside" not in runs.call(root, run, *options, "--train.max_steps", "4")
    assert saved(run) == [3, 4] and steps(run) == [1, 2, 3, 4]


def test_resume_from_a_path_counts_once(root, run, tmp_path):
    """A batch script repeats its command after each interruption."""
    other = tmp_path / "other"
    start = ["--resume", str(run / "checkpoints/step-000000002")]
    runs.call(root, other, *SAVING[:-1], "4", *start)
    printed = runs.call(root, other, *SAVING, *start)
    assert [row["step"] for row in runs.rows(other, "event") if row["event"] == "resumed"] == [2, 4]
    assert steps(other) == [3, 4, 5, 6]
    assert "resuming from step-000000004" in printed
    assert yaml.safe_load((other / "config.yaml").read_text())["resume"] == "auto"


def test_resume_from_a_path_counts_once_without_the_ledger_too(root, run, tmp_path):
    """It was emptied by a power cut: later checkpoints are not set aside for PATH again."""
    other = tmp_path / "other"
    start = ["--resume", str(run / "checkpoints/step-000000002")]
    runs.call(root, other, *SAVING[:-1], "4", *start)
    (other / "metrics.jsonl").write_text("")
    printed = runs.call(root, other, *SAVING, *start)
    assert "resuming from step-000000004" in printed and "no rows of steps 1 to 4" in printed
    assert steps(other) == [5, 6] and not list(other.glob("set-aside-*"))
    for _, path in runs.list_checkpoints(other / "checkpoints"):
        (path / "model.pt").write_bytes(b"damaged")
    assert "has no undamaged checkpoint" in runs.call(root, other, *SAVING, *start, expect=2)


def test_a_moved_run_is_resumed_where_it_lies(root, run, tmp_path):
    old = yaml.safe_load((run / "config.yaml").read_text())["run_dir"]
    shutil.move(old, f"{old}-kept")  # the fixture's folder, of which `run` is a copy
    try:
        argv = ["train", "--config", str(run / "config.yaml"), "--train.max_steps", "7"]
        assert runs.main(argv) == 0
        assert steps(run) == [1, 2, 3, 4, 5, 6, 7]
        assert not runs.Path(old).exists()
    finally:
        shutil.move(f"{old}-kept", old)


def test_a_config_written_by_hand_is_kept(root, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    text = "# found by a long search\n" + runs.TINY.read_text()
    (run / "config.yaml").write_text(text)
    for count in ("1", "2"):
        runs.call(root, run, "--train.max_steps", count, recipe=str(run / "config.yaml"))
    assert (run / "config.given.yaml").read_text() == text
    assert not (run / "config.given-2.yaml").exists()


@pytest.mark.parametrize("text", ["", "optim: [lr", "optim: {lr: fast}"])
def test_a_damaged_config_is_named_and_can_be_removed(root, run, text):
    (run / "config.yaml").write_text(text)
    line = runs.call(root, run, *SAVING, expect=2).splitlines()[-1]
    assert f"{run / 'config.yaml'} is damaged" in line and "remove it" in line
    (run / "config.yaml").unlink()
    assert "optim.lr" in runs.call(root, run, *SAVING, "--optim.lr", "0.01", expect=2)
    assert "already finished" in runs.call(root, run, *SAVING)


def test_strange_files_stay_and_own_leftovers_go(root, run):
    theirs = [run / ".notes.tmp", run / ".plot.12.tmp", run / "checkpoints/.step-notes.tmp"]
    own = [run / ".config.yaml.123-0a1b2c3d.tmp", run / ".writable.99.tmp"]
    for path in [*theirs[:2], *own]:
        path.write_text("x")
    theirs[2].mkdir()
    (run / ".metrics.jsonl.12.tmp").mkdir()
    runs.call(root, run, *SAVING[:-1], "7")
    assert all(path.exists() for path in theirs) and not any(path.exists() for path in own)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "finished", "lock", "stop"])
def test_a_folder_in_a_files_place_is_named(root, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    printed = runs.call(root, tmp_path / "run", expect=2)
    assert str(tmp_path / "run" / name) in printed and "Traceback" not in printed


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_a_file_in_a_folders_place_is_named(root, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    printed = runs.call(root, tmp_path / "run", expect=2)
    assert f"{tmp_path / name} is a file, and a run needs a folder there" in printed


def test_a_file_in_the_place_of_wandbs_folder_costs_one_line(tmp_path):
    (tmp_path / "wandb").touch()
    said = []
    view = WandbView(TrackingConfig(wandb="offline"), tmp_path, {}, {}, said.append)
    view.log({"kind": "train", "step": 1, "loss": 0.5})
    view.close()
    assert len(said) == 1 and f"{tmp_path / 'wandb'} can't be made" in said[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("RUN", "is a folder of 3 checkpoints; give one of them, such as the newest: --resume RUN/checkpoints/step-0"),
        ("RUN/checkpoints", "is a folder of 3 checkpoints"),
        ("RUN/checkpoints/step-000000002/model.pt", "give its folder: --resume RUN/checkpoints/step-000000002"),
        ("last", "no such folder; give a checkpoint folder"),
        ("", "--resume is empty"),
    ],
)
def test_a_path_that_is_no_checkpoint_names_those_that_are_there(finished, given, words):
    with pytest.raises(UserError) as found:
        named_checkpoint(given.replace("RUN", str(finished)))
    assert words.replace("RUN", str(finished)) in str(found.value)


def test_a_run_that_starts_at_its_end_has_a_checkpoint_of_its_own(root, run, tmp_path):
    """From another run's last one: it is scored, and can be exported."""
    runs.call(root, tmp_path / "other", *SAVING, "--resume", str(run / "checkpoints/step-000000006"))
    assert saved(tmp_path / "other") == [6] and steps(tmp_path / "other", "eval") == [6]
    runs.assert_same_state(runs.checkpoint_at(tmp_path / "other", 6), runs.checkpoint_at(run, 6))


def test_a_copy_becomes_a_wandb_run_of_its_own_and_a_moved_run_does_not(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)

    def identify(name):
        (tmp_path / name).mkdir(exist_ok=True)
        view = WandbView(TrackingConfig(wandb="offline"), tmp_path / name, {}, {}, print)
        view.close()
        return (tmp_path / name / "wandb/run-id").read_text().split()[0]

    first = identify("one")
    assert identify("one") == first
    shutil.copytree(tmp_path / "one", tmp_path / "copy", symlinks=True)
    assert identify("copy") != first and identify("one") == first
    (tmp_path / "one").rename(tmp_path / "moved")
    assert identify("moved") == first
