"""The package from Python."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

import pipeline
from pipeline.dataset import workers
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.errors import UserError

SCRIPT = Path(__file__).parents[1] / "examples/ten_lines.py"


def test_the_ten_lines(root, tmp_path):
    command = [sys.executable, str(SCRIPT), str(root), str(tmp_path / "run")]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^4 steps, last loss \d\.\d+, top-1 \d+\.\d+ %$", done.stdout, re.M), done.stdout
    assert (tmp_path / "run/finished").exists()


def test_a_run_is_that_of_the_command(root, tmp_path):
    """The same ledger; signal handlers are put back, and torch's defaults; a second call finds it finished."""
    options = {"data.root": root, "train.max_steps": 3, "train.precision": "fp32", "data.crop_area": [0.5, 1.0]}
    config = pipeline.load_config(runs.TINY, options | {"run_dir": tmp_path / "own"})
    assert config.data.crop_area == (0.5, 1.0) and config.train.max_steps == 3
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    hook = sys.excepthook
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # as a program sets "cuda": weights would be drawn there
    try:
        assert pipeline.train(config) and pipeline.train(config)
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.float64, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert sys.excepthook is hook
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


def test_lines_go_to_the_logger_and_nothing_is_attached(root, tmp_path, capsys, caplog):
    """A script sees what its own logging shows; the command line shows all on stdout."""
    logger = logging.getLogger("pipeline")
    options = {"data.root": root, "train.max_steps": 1, "run_dir": tmp_path / "script", "train.device": "cpu"}
    config = pipeline.load_config(runs.TINY, options | {"augment.fill": None})
    assert not logger.handlers and logger.propagate and logger.level == logging.NOTSET
    with caplog.at_level("INFO", logger="pipeline"):
        pipeline.train(config)
        pipeline.evaluate(tmp_path / "script", checkpoint="last", device="cpu")
    assert capsys.readouterr().out == ""
    lines = [record.getMessage() for record in caplog.records if record.name == "pipeline"]
    for words in ("starting at step 0", "step 1/1  epoch", "validation loss", "val_top1"):
        assert any(words in line for line in lines), words
    shown = runs.call(root, tmp_path / "command", "--train.max_steps", "1")
    assert all(words in shown for words in ("starting at step 0", "step 1/1  epoch", "validation loss"))
    assert not logger.handlers and logger.propagate and logger.level == logging.NOTSET
    script = "import pipeline, logging; pipeline.train, pipeline.TrainLoader; print(logging.root.handlers)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert found.stdout == "[]\n"


SEVERAL = """
import sys, json
import pipeline
options = {"data.root": sys.argv[1], "run_dir": sys.argv[2], "train.device": "cpu"}
for steps in (2, 3):
    config = pipeline.load_config(sys.argv[3], options | {"train.max_steps": steps})
    finished = pipeline.train(config)
    first, second = (pipeline.evaluate(sys.argv[2], checkpoint="last", device="cpu") for _ in range(2))
    assert finished and first["val_loss"] == second["val_loss"] if first else second == {}
    if first:
        print("SCORED", json.dumps([first["step"], first["images"], first["val_loss"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True], ids=["c10d", "no launcher"])
def test_train_and_evaluate_in_one_process_on_two_ranks(root, tmp_path, static):
    """Twice, so that a second training meets, too: under torchrun, and by two processes that only know each other."""
    script = tmp_path / "script.py"
    script.write_text(SEVERAL)
    arguments = [str(script), str(root), str(tmp_path / "run"), str(runs.TINY)]
    if static:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        starts = [([sys.executable, *arguments], place | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    else:
        starts = [([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *arguments], {})]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [subprocess.Popen(command, env=runs.environment() | own, **options) for command, own in starts]
    printed = "".join(rank.communicate(timeout=200)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), printed
    scored = [json.loads(line) for line in re.findall(r"^SCORED (.*)$", printed, re.M)]
    evals = pipeline.read_ledger(tmp_path / "run", "eval")
    assert [row["step"] for row in evals] == [2, 3], printed
    assert [found[:2] for found in scored] == [[row["step"], 24] for row in evals]
    assert [found[2] for found in scored] == pytest.approx([row["val_loss"] for row in evals], rel=1e-5)


def test_mistakes_are_one_line(tmp_path, capsys):
    for name, text in (("empty", ""), ("list", "- a"), ("torn", "model: {name: resnet18")):
        (tmp_path / f"{name}.yaml").write_text(text)
    for recipe, options, said in (
        ("resnet512", {}, "is neither a file nor a recipe"),
        (tmp_path / "empty.yaml", {}, r"empty\.yaml is empty; give a YAML file"),
        (tmp_path / "list.yaml", {}, r"list\.yaml holds .*, not options"),
        (tmp_path / "torn.yaml", {}, r"torn\.yaml is not valid YAML: .* line 1, column 8"),
        (tmp_path, {}, r"is a folder; give a YAML file"),
        ("smoke", {"optim.lrr": 0.1}, "did you mean --optim.lr"),
        ("smoke", {"train.max_steps": "many"}, "--train.max_steps many: give a whole number"),
        ("smoke", {"augment.mixup": -1}, "augment.mixup is -1"),
        ("smoke", {"run_dir": None}, "--run_dir is null: give a value"),
        ("smoke", {"model": {"name": None}}, "--model.name is null"),
    ):
        with pytest.raises(UserError, match=said) as found:
            pipeline.load_config(recipe, options)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="unknown option chekpoint"):
        pipeline.evaluate(tmp_path, chekpoint="best")
    with pytest.raises(UserError, match="has no metrics"):
        pipeline.read_ledger(tmp_path)
    with pytest.raises(UserError, match="kind is 'trian': give 'train'"):
        pipeline.read_ledger(tmp_path, "trian")
    with pytest.raises(UserError, match=r"config is 'tiny\.yaml': give what pipeline.load_config"):
        pipeline.train("tiny.yaml")
    assert capsys.readouterr().err == ""


def test_values_of_other_kinds_are_taken_or_named(root, tmp_path):
    """A list of sizes, NumPy's numbers, torch's devices: as they come in a notebook."""
    options = {
        "data.root": root,
        "run_dir": tmp_path / "run",
        "train.max_steps": np.int64(1),
        "optim.lr": np.float32(0.5),
    }
    options |= {"train.device": torch.device("cpu"), "data.mean": np.array([0.5, 0.25, 0.5])}
    config = pipeline.load_config(runs.TINY, options)
    assert (config.train.max_steps, config.optim.lr, config.data.mean) == (1, 0.5, (0.5, 0.25, 0.5))
    pipeline.train(config)
    for checkpoint in (1, "1", Path(tmp_path / "run/checkpoints/step-000000001")):
        found = pipeline.evaluate(tmp_path / "run", checkpoint=checkpoint, sizes=[32, 48], device=torch.device("cpu"))
        assert [row["size"] for row in found["results"]] == [32, 48]
    for name, value, said in (
        ("batch_size", "many", "--batch_size many: give a whole number"),
        ("flip", 3, "flip"),
        ("device", "gpu", "device"),
        ("sizes", object(), "sizes is <object object"),
    ):
        with pytest.raises(UserError, match=said) as error:
            pipeline.evaluate(tmp_path / "run", **{name: value})
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"optim\.lr is <object object"):
        pipeline.load_config(runs.TINY, {"optim.lr": object()})


def test_one_run_at_a_time_in_a_process(monkeypatch, tmp_path):
    """Two threads ended with errors from inside torch; a forked process waited for threads that it did not have."""
    config = pipeline.load_config(runs.TINY, {"run_dir": tmp_path / "run"})
    refused = []

    def train_config(*_):  # meanwhile, another thread and a forked process
        for call in (lambda: pipeline.train(config), lambda: pipeline.evaluate(tmp_path / "run")):
            with pytest.raises(UserError, match="another thread of this process trains or evaluates"):
                call()
            refused.append(True)

    monkeypatch.setattr("pipeline.training.cli.train_config", train_config)
    assert not pipeline.train(config) and len(refused) == 2
    monkeypatch.setattr("pipeline.training.cli.train_config", lambda *_: None)
    assert not pipeline.train(config)
    pid = os.fork()
    if pid == 0:
        try:
            pipeline.train(config)
            os._exit(1)
        except UserError as error:
            os._exit(0 if "was forked from one that has trained" in str(error) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_two_threads_may_start_worker_processes(monkeypatch):
    """While one starts, the program's module is hidden; the other must not take the empty one for it."""
    program, entered, another = sys.modules["__main__"], threading.Event(), threading.Event()

    def start(process):
        entered.set()
        if process.name == "first":
            another.wait(0.3)  # the second one begins meanwhile, unless it waits for the first
        else:
            another.set()
            first.join(20)  # and ends after it

    monkeypatch.setattr(workers.SpawnProcess, "start", start)
    first, second = (threading.Thread(target=workers._WorkerProcess(name=name).start) for name in ("first", "second"))
    first.start()
    assert entered.wait(20)
    second.start()
    second.join(20)
    assert sys.modules["__main__"] is program


def test_a_script_without_a_guard_indexes_with_several_processes(tmp_path):
    """Worker processes do not run it again: it would wait for itself."""
    generate_tree(tmp_path / "data", Settings(classes=2, train_per_class=30, val_per_class=2, size=16, oddities=0))
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from pipeline.dataset.index import scan, scan_split\n"
        "scan_split.SMALL = 1\n"
        "print('begins', flush=True)\n"
        "index = scan.build_index(Path(sys.argv[1]), processes=2)\n"
        "print(len(index.splits['train']), sys.modules['__main__'].__file__)\n"
    )
    command = [sys.executable, str(tmp_path / "mine.py"), str(tmp_path / "data")]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["begins", "60", str(tmp_path / "mine.py")]
