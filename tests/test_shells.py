"""Starts in every kind of shell: leftovers of launchers, srun alone, notebooks, small data, interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import runs
from launching import free_port

from pipeline import rank_env
from pipeline.__main__ import main
from pipeline.counts import count
from pipeline.training.data import open_data
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.world import World

PIPED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
ONE_STEP = ["--train.max_steps", "1"]


@pytest.fixture
def bare(monkeypatch):
    """No launcher's variables."""
    for name in [
        *rank_env.NAMES,
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        *(name for name in os.environ if name.startswith("SLURM_")),
    ]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "8"},
        {"RANK": "one"},
        {"WORLD_SIZE": "2", "MASTER_ADDR": "h"},
        {"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    ],
)
def test_variables_left_over_are_named_with_the_remedy(root, tmp_path, bare, left):
    for name, value in left.items():
        bare.setenv(name, value)
    printed = runs.call(root, tmp_path / "run", *ONE_STEP, expect=2)
    assert all(f"{name}={value}" in printed for name, value in left.items() if name != "MASTER_ADDR")
    assert "torchrun" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "-1"), ("LOCAL_WORLD_SIZE", "two")])
def test_local_ranks_that_are_no_numbers_are_named(bare, name, value):
    """int() of them was a traceback; alone, without a launcher, nobody reads them."""
    bare.setenv(name, value)
    assert rank_env.find_leftovers() is None
    for other, given in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        bare.setenv(other, given)
    assert f"{name}={value} in the environment is not a whole number" in rank_env.find_leftovers()


def test_other_verbs_speak_whatever_the_rank(bare, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        bare.setenv(name, value)
    assert main(["status", "nowhere"]) == 2
    assert "nowhere is not a run folder" in capsys.readouterr().err


def test_rank_zero_of_one_trains_alone(root, tmp_path, bare):
    bare.setenv("RANK", "0")
    bare.setenv("LOCAL_RANK", "3")
    runs.call(root, tmp_path / "run", *ONE_STEP)


def tasks(environments, root, run):
    command = runs.command(root, run, *ONE_STEP)
    started = [
        subprocess.Popen(
            command, env=runs.environment() | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for own in environments
    ]
    return [(task.communicate(timeout=120)[0], task.returncode) for task in started]


def test_tasks_of_srun_become_the_ranks_of_one_run(root, tmp_path, bare):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    ended = tasks([step | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)], root, tmp_path / "run")
    assert [code for _, code in ended] == [0, 0], ended
    assert "srun started 2 tasks without torchrun" in ended[0][0]
    assert [row["world_size"] for row in runs.rows(tmp_path / "run", "event") if "world_size" in row] == [2]


def test_a_batch_script_is_no_task_of_srun(bare):
    """sbatch sets SLURM_PROCID and SLURM_NTASKS for the script itself, which is one process."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}.items():
        bare.setenv(name, value)
    assert rank_env.adopt_srun_tasks() is None and "RANK" not in os.environ


@pytest.mark.parametrize(
    ("names", "first"),
    [("node3", "node3"), ("a,b", "a"), ("node[03-07,9],x", "node03"), ("n[1,4]", "n1"), ("x,node[1-2]", "x"), ("", "")],
)
def test_the_first_node_of_a_step(names, first):
    assert rank_env._first_node(names) == first


def test_ranks_without_a_launcher_meet_and_heed_a_signal_while_they_wait(root, tmp_path, bare):
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = runs.command(root, tmp_path / "run", *ONE_STEP)
    for rank in ("0", "1"):
        waiting = subprocess.Popen(
            command,
            env=runs.environment() | own | {"RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert "waiting at 127.0.0.1" in waiting.stdout.readline()
        waiting.send_signal(signal.SIGTERM)
        output, _ = waiting.communicate(timeout=30)
        assert waiting.returncode == 75 and "Traceback" not in output
    ended = tasks([own | {"RANK": rank} for rank in ("0", "1")], root, tmp_path / "run")
    assert [code for _, code in ended] == [0, 0], ended


def test_a_program_gets_its_signal_handlers_back(root, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    argv = runs.command(root, tmp_path / "run", *ONE_STEP)
    assert main(argv[argv.index("pipeline") + 1 :]) == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_thread_may_train(root, tmp_path):
    argv = runs.command(root, tmp_path / "run", *ONE_STEP)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(argv[argv.index("pipeline") + 1 :])))
    thread.start()
    thread.join(120)
    assert codes == [0]


def test_fewer_images_than_a_batch_are_said(root, tmp_path, capsys):
    few = ["--train.global_batch_size", "200", *ONE_STEP]
    assert "warning: the data set has 96 training images, fewer than --train.global_batch_size 200" in runs.call(
        root, tmp_path / "run", *few
    )
    main(["preflight", "--config", str(runs.TINY), "--data.root", str(root), "--run_dir", str(tmp_path / "new"), *few])
    line = next(line for line in capsys.readouterr().out.splitlines() if " data " in line)
    assert line.startswith("WARN") and "96" in line and "200" in line


def test_one_class_alone_is_said(synthetic_root, tmp_path, capsys):
    folder = min((synthetic_root / "ILSVRC/Data/CLS-LOC/train").iterdir())
    for split in ("train", "val"):
        shutil.copytree(folder, tmp_path / "data" / split / "thing")
    warned = "the data set has one class: all images have the same label"
    printed = runs.call(tmp_path / "data", tmp_path / "run", *ONE_STEP)
    assert f"warning: {warned}" in printed
    assert "images of 1 class by" in printed and "finished: 1 step, top-1" in printed
    options = ["--data.root", str(tmp_path / "data"), "--run_dir", str(tmp_path / "new")]
    main(["preflight", "--config", str(runs.TINY), *options])
    line = next(line for line in capsys.readouterr().out.splitlines() if " data " in line)
    assert line.startswith("WARN") and ", 1 class, " in line and warned in line


def test_classes_without_validation_images_are_said(synthetic_root, tmp_path, capsys):
    for folder in (synthetic_root / "ILSVRC/Data/CLS-LOC/train").iterdir():
        shutil.copytree(folder, tmp_path / "data/train" / folder.name)
    lacking, *scored = sorted((tmp_path / "data/train").iterdir())
    for folder in scored:
        shutil.copytree(folder, tmp_path / "data/val" / folder.name)
    warned = f"1 of {len(scored) + 1} classes without a validation image ({lacking.name}): the scores say nothing"
    assert f"warning: {warned}" in runs.call(tmp_path / "data", tmp_path / "run", *ONE_STEP)
    options = ["--data.root", str(tmp_path / "data"), "--run_dir", str(tmp_path / "new")]
    main(["preflight", "--config", str(runs.TINY), *options])
    line = next(line for line in capsys.readouterr().out.splitlines() if " data " in line)
    assert line.startswith("WARN") and warned in line


def test_numbers_of_things():
    assert [count(1, "step"), count(2000, "step"), count(0, "image")] == ["1 step", "2,000 steps", "0 images"]
    assert [count(1, "class"), count(3, "class"), count(2, "batch")] == ["1 class", "3 classes", "2 batches"]


def test_without_a_recipe_one_line_says_what_is_trained(capsys):
    """It comes before all that may fail, as the building of an index may take hours."""
    assert main(["train", "--optim.lr", "0.3"]) == 2
    said, error = capsys.readouterr().err.splitlines()
    assert "no --config" in said and "optim.lr 0.3" in said and "schedule.epochs 90" in said and "resnet152" in said
    assert "--config NAME" in said and "pipeline recipes" in said
    assert "--run_dir is missing" in error
    assert main(["train", "--config=smoke"]) == 2
    assert "no --config" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["fetch", ""], "DEST"),
        (["stage", "", "x"], "SOURCE"),
        (["pack", "x", ""], "DEST"),
        (["audit", "x", ""], "RUNS"),
    ],
)
def test_a_variable_that_is_not_set_is_not_the_current_folder(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert f"{named} is empty; is a variable not set?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_stop_request_ends_the_building_of_an_index_at_once(synthetic_root, tmp_path, monkeypatch):
    """The signal comes from inside the scan, so that it surely comes in its midst."""
    from pipeline.config import DataConfig
    from pipeline.dataset.index import scan_split

    stop = StopRequest()
    try:
        real = scan_split.inspect_all

        def inspect(paths):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(paths)

        monkeypatch.setattr(scan_split, "inspect_all", inspect)
        data = DataConfig(root=str(synthetic_root), index=str(tmp_path / "index")).resolve()
        with pytest.raises(KeyboardInterrupt):
            scan_here = World()
            monkeypatch.setattr(World, "on_rank_zero", lambda self, build, limit_s=None: build())
            open_data(data, scan_here, lambda _: None, stop=stop)
        assert not (tmp_path / "index/index.json").exists() and (tmp_path / "index/scan.journal").exists()
        assert stop.reason == "SIGTERM"
    finally:
        stop.restore_handlers()


def test_the_first_interrupt_says_what_happens(root, tmp_path):
    run = tmp_path / "run"
    code, output = runs.stop_when(
        lambda: len(runs.rows(run, "train")) >= 2, signal.SIGINT, root, run, "--schedule.epochs", "4000"
    )
    assert code == 75 and "stopping; saving at the end of this step" in output


def test_quickstart_needs_no_address_of_the_own_host_name():
    script = (runs.Path(__file__).parents[1] / "scripts/quickstart.sh").read_text()
    assert "--local-addr=127.0.0.1" in script


#: an account that no passwd file knows, in an empty environment; it may read what the interpreter lies in
STRANGER = [
    *("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"),
    *("--inh-caps=+dac_override,+dac_read_search", "--ambient-caps=+dac_override,+dac_read_search"),
    *("env", "-i", "PATH=/usr/bin:/bin", "OMP_NUM_THREADS=1", "PYTHONDONTWRITEBYTECODE=1"),
]


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_an_account_without_a_home_or_a_name(root, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o777)
    here = [f"PYTHONPATH={runs.Path(__file__).parents[1]}", f"TMPDIR={temporary}"]

    def as_stranger(*argv):
        command = [*STRANGER, *here, sys.executable, "-m", "pipeline", *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        assert f"HOME is not set: caches and keys are looked for in {temporary}/pipeline-home-54321" in done.stderr
        return done

    run = temporary / "run"
    argv = runs.command(root, run, *ONE_STEP, "--tracking.wandb", "auto")
    done = as_stranger(*argv[argv.index("pipeline") + 1 :])
    assert done.returncode == 0 and len(runs.rows(run, "train")) == 1, done.stderr
    assert "finished" in as_stranger("status", str(run)).stdout
    fetched = as_stranger("fetch", str(temporary / "data"))
    assert fetched.returncode == 2 and "no Kaggle credentials" in fetched.stderr
    assert (temporary / "pipeline-home-54321").stat().st_mode & 0o777 == 0o700


def test_a_program_that_calls_main_gets_a_code_and_goes_on(root, tmp_path, capsys):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers], sys.excepthook, threading.excepthook
    for argv, code in (
        (["train", "--help"], 0),
        (["train", "--optim.lr", "many"], 2),
        (["train", "--no.such", "1"], 2),
        (["status"], 2),
        (["continue", "nowhere", "--epochs", "9"], 2),
        (["evaluate", "nowhere"], 2),
        (["report", "nowhere", "--device", "gpu"], 2),
        (["recipes"], 0),
        (["nothing"], 2),
    ):
        assert main(argv) == code, argv
        printed = "".join(capsys.readouterr())
        assert "Traceback" not in printed
    assert before == ([signal.getsignal(number) for number in numbers], sys.excepthook, threading.excepthook)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_saves_unless_it_was_ignored_at_the_start(root, tmp_path, ignored):
    run = tmp_path / "run"
    command = runs.command(root, run, "--schedule.epochs", "4000")
    process = subprocess.Popen(["nohup", *command] if ignored else command, env=runs.environment(), **PIPED)
    while len(runs.rows(run, "train")) < 2 and process.poll() is None:
        time.sleep(0.01)  # polls a condition
    process.send_signal(signal.SIGHUP)
    if ignored:
        done = len(runs.rows(run, "train"))
        while len(runs.rows(run, "train")) < done + 3 and process.poll() is None:
            time.sleep(0.01)  # polls a condition
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    facts = json.loads((run / "interrupted").read_text())
    assert facts["reason"] == ("SIGTERM" if ignored else "SIGHUP")
    assert runs.checkpoint_at(run, facts["step"]).is_dir()


@pytest.mark.parametrize("verb", ["train", "continue", "launch", "evaluate"])
def test_another_system_is_one_line(monkeypatch, capsys, verb):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main([verb, "--help"]) == 2
    printed = capsys.readouterr().err
    assert printed == f"pipeline {verb}: needs Linux, and this is darwin: run it in a Linux container\n"


def has_uts():
    return subprocess.run(["unshare", "--uts", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(shutil.which("unshare") is None or not has_uts(), reason="needs root for unshare --uts")
def test_launch_where_the_own_host_name_has_no_address(root, tmp_path):
    command = runs.command(root, tmp_path / "run", *ONE_STEP, "--train.eval_every_epochs", "100")
    launch = [sys.executable, "-m", "pipeline", "launch", "--nproc-per-node=2", *command[1:]]
    script = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host-x; exec "$@"', "sh", *launch]
    done = subprocess.run(script, env=runs.environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert runs.rows(tmp_path / "run", "event")[0]["host"] == "no-such-host-x"


def test_a_tilde_that_the_shell_has_left_is_the_home_folder(tmp_path, monkeypatch, capsys):
    """It leaves `~` in quotes, and in `--from=~/a.zip`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", "~/data", "--from=~/a.zip"]) == 2
    assert str(tmp_path / "home/a.zip") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert main(["verify", "~no-such-account/data"]) == 2
    assert "no account has that name" in capsys.readouterr().err
