"""`pipeline continue`: a finished run trained on in a new run folder, along the same curve or another one."""

import shutil
import signal

import pytest
import runs

from pipeline.__main__ import main
from pipeline.training import loop
from pipeline.training.start import Start

FEW = ["--checkpoint.keep", "2", "--train.precision", "fp32", "--train.eval_every_epochs", "2"]
STEPWISE = [
    *("--schedule.name", "multistep", "--schedule.milestones", "[1, 3]", "--schedule.reference_epochs", "2"),
    *("--ema.decay", "0.9", "--ema.every_steps", "2"),
]


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """Name of a schedule -> a run of 2 epochs (10 steps)."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            options = STEPWISE if name == "multistep" else []
            runs.call(root, made[name], *FEW, *options, "--schedule.epochs", "2")
        return made[name]

    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished("cosine"), tmp_path / "run")


def extend(capfd, *argv, expect=0):
    code = main(["continue", *map(str, argv)])
    printed = "".join(capfd.readouterr())
    assert code == expect and "Traceback" not in printed, printed[-3000:]
    return printed


def column(run, name):
    return [row[name] for row in runs.rows(run, "train")]


def test_along_the_same_curve_it_is_one_longer_run(root, finished, tmp_path, capfd):
    """Bit for bit: weights, momentum, average, images, learning rates."""
    whole, new = tmp_path / "whole", tmp_path / "new"
    runs.call(root, whole, *FEW, *STEPWISE, "--schedule.epochs", "4", "--schedule.reference_epochs", "4")
    printed = extend(capfd, finished("multistep"), "--epochs", "4", "--run_dir", new)
    assert "step 10 (epoch 2.083) to epoch 4: weights, momentum, average" in printed and "same curve" in printed
    assert runs.repeatable(new) == runs.repeatable(whole)[10:]
    assert column(new, "lr")[0] == pytest.approx(0.005) and column(new, "lr")[-1] == pytest.approx(0.0005)
    runs.assert_same_state(runs.checkpoint_at(new, 19), runs.checkpoint_at(whole, 19))


def test_a_curve_that_depends_on_the_length_starts_anew_and_says_so(root, run, capfd):
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    new = run.with_name("run-to-6")
    printed = extend(capfd, run, "--epochs", "6", "--optim.lr", "0.02")
    assert "start over, 0.4167 epochs of warm-up and then cosine; not the curve of one run" in printed
    assert "changed from here on: optim.lr" in printed
    rates = column(new, "lr")
    assert len(rates) == 19 and column(new, "step")[0] == 11
    assert rates[0] == pytest.approx(0.1 * 0.02) and rates[2] == pytest.approx(0.02) == max(rates)
    assert rates == [rates[0], rates[1], *sorted(rates[2:], reverse=True)] and rates[-1] < 0.001
    scores = [(row["step"], row["val_loss"]) for row in runs.rows(new, "eval")]
    assert scores[0] == (10, runs.rows(run, "eval")[-1]["val_loss"])  # as it was left
    assert [row["event"] for row in runs.rows(new, "event")] == ["continued", "resumed", "finished"]
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before


def test_the_last_rate_may_stay(root, run, capfd):
    extend(capfd, run, "--epochs", "3", "--rate", "last", "--run_dir", run.with_name("new"))
    assert set(column(run.with_name("new"), "lr")) == {column(run, "lr")[-1]}
    assert "last learning rate" not in extend(
        capfd, run, "--epochs", "3", "--rate", "last", "--run_dir", run.with_name("new")
    )


def test_interrupted_it_resumes_without_the_old_folder(root, run, capfd):
    """Killed in its first steps; by the same command, with the old folder and without it; by its configuration."""
    new = run.with_name("new")
    command = [runs.sys.executable, "-m", "pipeline", "continue", str(run), "--epochs", "400", "--run_dir", str(new)]
    process = runs.subprocess.Popen(command, env=runs.environment(), stdout=runs.subprocess.DEVNULL)
    while len(runs.rows(new, "train")) < 2 and process.poll() is None:
        runs.time.sleep(0.01)  # polls a condition
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    extend(capfd, run, "--epochs", "400", "--run_dir", new, "--train.max_steps", "13")
    shutil.rmtree(run)
    assert "--epochs 400" in extend(capfd, run, "--epochs", "300", "--run_dir", new, expect=2)
    begun = [run, "--epochs", "400", "--run_dir", new]
    assert "always goes on" in extend(capfd, *begun, "--resume", "never", expect=2)
    assert "are gone" in extend(capfd, *begun, "--train.max_steps", "14")
    extend(capfd, *begun, "--train.max_steps", "14", "--resume", runs.checkpoint_at(new, 13))  # back in its own history
    assert list(new.glob("set-aside-*"))
    assert column(new, "step") == [11, 12, 13, 14]
    assert main(["train", "--config", str(new / "config.yaml"), "--train.max_steps", "15"]) == 0
    assert column(new, "step") == [11, 12, 13, 14, 15]
    assert sum(row["event"] == "continued" for row in runs.rows(new, "event")) == 1


def test_it_resumes_without_its_ledger(root, run, capfd):
    """It was emptied by a power cut."""
    command = [run, "--epochs", "6", "--run_dir", run.with_name("new")]
    extend(capfd, *command, "--train.max_steps", "12")
    first = column(run.with_name("new"), "step")
    (run.with_name("new") / "metrics.jsonl").write_text("")
    for last in ("13", "14"):
        lost = f"no rows of steps {first[0]} to 12, and"
        assert lost in extend(capfd, *command, "--train.max_steps", last)
    assert column(run.with_name("new"), "step") == [13, 14]


def test_a_run_does_not_start_before_its_schedule(root, run, tmp_path, capfd):
    """Its learning rates would be negative. Not by the option itself, by the configuration of a run that was continued
    in another folder, or where that run was killed before the checkpoint was copied."""
    code = main(["train", *runs.command(root, tmp_path / "typed")[4:], "--schedule.begin", "2"])
    printed = "".join(capfd.readouterr())
    assert code == 2 and "--schedule.begin 2" in printed and "step 10" in printed and "pipeline continue" in printed
    runs.call(root, tmp_path / "typed", "--train.max_steps", "1")
    assert column(tmp_path / "typed", "step") == [1]
    new, options = tmp_path / "new", ["--epochs", "6", "--train.max_steps", "12"]
    extend(capfd, run, *options, "--run_dir", new)
    assert main(["train", "--config", str(new / "config.yaml"), "--run_dir", str(tmp_path / "other")]) == 2
    assert "--schedule.begin 10ba" in "".join(capfd.readouterr())
    killed = tmp_path / "killed"
    killed.mkdir()
    shutil.copy(new / "config.yaml", killed)
    (killed / "metrics.jsonl").write_text((new / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    assert main(["train", "--config", str(new / "config.yaml"), "--run_dir", str(killed)]) == 2
    assert "has no checkpoint, though its metrics.jsonl records 10 steps" in "".join(capfd.readouterr())
    extend(capfd, run, *options, "--run_dir", killed)
    assert runs.repeatable(killed) == runs.repeatable(new)


def test_a_continued_run_does_not_roll_back_before_its_beginning(run, tmp_path, capfd, monkeypatch):
    """There it would have new weights and a negative learning rate. Its ledger stays as it is."""
    monkeypatch.setattr(loop, "find_rollback_start", lambda *given: Start())  # as if its checkpoints were gone
    options = ["--epochs", "6", "--optim.lr", "1e30", "--guard.max_skipped", "2", "--run_dir", tmp_path / "new"]
    assert "--schedule.begin 10ba" in extend(capfd, run, *options, expect=2)
    assert "rolled_back" not in [row["event"] for row in runs.rows(tmp_path / "new", "event")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--epochs", "2"], ["has trained 10 steps already", "give more"]),
        (["--epochs", "many"], ["--epochs many", "120"]),
        ([], ["--epochs is required"]),
        (["--schedule.epochs", "6", "--epochs", "6"], ["instead of --schedule.epochs"]),
        (["--epochs", "6", "--optim.name", "adamw"], ["keeps --optim.name", "--model.weights"]),
        (["--epochs", "6", "--model.name", "resnet34"], ["keeps --model.name"]),
        (["--epochs", "6", "--optim.weight_decay", "0.1"], ["keeps --optim.weight_decay"]),
        (["--epochs", "6", "--train.global_batch_size", "10"], ["keeps --train.global_batch_size"]),
        (["--epochs", "6", "--rate", "follow"], ["--rate follow: cosine depends on", "restart or last"]),
        (["--epochs", "6", "--run_dir", "SAME"], ["is the run itself"]),
        (["--epochs", "6", "--run_dir", "OTHER"], ["holds another run", "--run_dir"]),
        (["--epochs", "6", "--resume", "never"], ["--resume never: pipeline continue always", "leave --resume out"]),
        (["--epochs", "6", "--resume", "LAST"], ["step-000000010: pipeline continue always", "leave --resume out"]),
    ],
)
def test_what_cannot_be_continued_is_one_line(finished, run, tmp_path, capfd, options, words):
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other/config.yaml").unlink()
    there = {"SAME": str(run), "OTHER": str(tmp_path / "other"), "LAST": str(runs.checkpoint_at(run, 10))}
    before = sorted(path.name for path in tmp_path.iterdir())
    printed = extend(capfd, run, *(there.get(item, item) for item in options), expect=2)
    assert len(printed.strip().splitlines()) == 1 and all(word in printed for word in words), printed
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("state", ["interrupted", "without its last checkpoint", "no run"])
def test_a_run_that_is_not_finished_is_refused(root, run, tmp_path, capfd, state):
    if state == "interrupted":
        runs.call(root, tmp_path / "half", *FEW, "--schedule.epochs", "2", "--train.max_steps", "5")
        ledger = tmp_path / "half/metrics.jsonl"
        ledger.write_text("".join(row for row in ledger.open() if '"finished"' not in row))
        run, words = tmp_path / "half", ["5 steps done", "step-000000005", "to the end first"]
    elif state == "no run":
        run, words = tmp_path / "nowhere", ["is not a run folder"]
    else:
        shutil.rmtree(runs.checkpoint_at(run, 10))
        words = ["10 steps done", "newest checkpoint"]
    capfd.readouterr()
    printed = extend(capfd, run, "--epochs", "6", expect=2)
    assert all(word in printed for word in words), printed


def test_a_run_that_stopped_at_a_limit_goes_on_to_its_own_length_and_beyond(root, tmp_path, capfd):
    """`train.max_steps` ends a run; it does not travel into the next."""
    runs.call(root, tmp_path / "run", *FEW, "--schedule.name", "constant", "--train.max_steps", "3")
    extend(capfd, tmp_path / "run", "--epochs", "8ba", "--run_dir", tmp_path / "new")
    assert column(tmp_path / "new", "step") == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("given", "named", "silent"),
    [
        (
            ["--schedule.epochs", "9"],
            ["--schedule.epochs is 4.0 in the run folder", "pipeline continue"],
            ["reference_epochs"],
        ),
        (
            ["--schedule.epochs", "3"],
            ["--schedule.epochs is 4.0 in the run folder", "--model.weights"],
            ["pipeline continue"],
        ),
        (["--schedule.epochs=9", "--schedule.warmup_epochs=1"], ["--schedule.warmup_epochs"], ["milestones"]),
        (["--model.name", "resnet34"], ["--model.name is resnet18 in the run folder"], ["data."]),
        (["--data.val_crop_ratio", "0.5", "--data.val_resize", "null"], ["--data.val_resize"], []),
        (
            ["--optim.lr", "0.3", "--train.seed", "1"],
            ["--optim.lr is 0.05 in the run folder, and 0.3 is asked for", "--train.seed"],
            [],
        ),
    ],
)
def test_a_refused_resume_names_what_was_typed(root, finished_whole, tmp_path, given, named, silent):
    run = shutil.copytree(finished_whole, tmp_path / "run")
    line = runs.call(root, run, "--train.max_steps", "1", *given, expect=2).strip().splitlines()[-1]
    assert all(word in line for word in named) and not any(word in line for word in silent), line


@pytest.fixture(scope="module")
def finished_whole(root, tmp_path_factory):
    run = tmp_path_factory.mktemp("short") / "run"
    runs.call(root, run, "--train.max_steps", "1")
    return run
