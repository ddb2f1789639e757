"""Real training processes for tests: started, killed, started again, and compared."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.__main__ import main
from pipeline.run_paths import list_checkpoints

TINY = Path(__file__).with_name("tiny.yaml")
NOT_REPEATABLE = ("images_per_s", "data_wait_fraction")  # times; all else in a training row must be


def command(
    root: Path,
    run_dir: Path,
    *options: str,
    processes: int = 1,
    recipe: str = str(TINY),
    program: Sequence[str] = ("-m", "pipeline"),
) -> list[str]:
    """A training command; on several processes under the real torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    train = [*program, "train", "--config", recipe, "--data.root", str(root), "--run_dir", str(run_dir)]
    return [*launcher, *train, *options]


def environment() -> dict[str, str]:
    """Of a training process, without what this one's W&B (a process of its own) and torch (where it compiled) left."""
    left = ("WANDB_SERVICE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    own = {name: value for name, value in os.environ.items() if name not in left}
    return own | {"WANDB_MODE": "offline"}


def train(*arguments, expect: int = 0, **options) -> str:
    """Run a training command to its end and return what it printed; its exit code must be `expect`."""
    done = subprocess.run(
        command(*arguments, **options), env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command of `command` to its end."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def call(*arguments, expect: int = 0, **options) -> str:
    """As `train`, by one process and inside this one: nothing has to be imported again."""
    argv = command(*arguments, **options)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(argv[argv.index("pipeline") + 1 :])
    except SystemExit as error:
        code = error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == expect, f"exit code {code}\n{printed.getvalue()[-4000:]}"
    return printed.getvalue()


def capture(argv: list[str], expect: int = 0) -> str:
    """What a command prints inside this process; its exit code must be `expect`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(argv)
    assert code == expect, f"exit code {code}\n{printed.getvalue()[-4000:]}"
    return printed.getvalue()


def rows(run_dir: Path, kind: str) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [row for row in whole if row["kind"] == kind]


def stop_when(ready, how: signal.Signals, *arguments, **options) -> tuple[int, str]:
    """Start a training command, send `how` to it as soon as `ready()`, and return its exit code and output.

    SIGKILL goes to every process of the command at once, anything else to the command alone.
    """
    process = subprocess.Popen(
        command(*arguments, **options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # polls a condition
    alive = process.poll() is None
    process.send_signal(how)
    output, _ = process.communicate(timeout=120)
    assert alive, f"ended before it could be stopped:\n{output[-3000:]}"
    return process.returncode, output


def kill_once_saved(step: int, root: Path, run_dir: Path, *options: str, **more) -> None:
    """SIGKILL a training command as soon as it has a checkpoint of `step` or later, which must be one of the next three
    steps: it waits then, so that a slow machine kills it before its end too."""

    def saved() -> bool:
        return any(found >= step for found, _ in list_checkpoints(run_dir / "checkpoints"))

    program = ["-m", "tests.inject", "wait", "0", str(step + 4)]
    stop_when(saved, signal.SIGKILL, root, run_dir, *options, **{"program": program} | more)


def repeatable(run_dir: Path) -> list[dict]:
    """The training rows without times."""
    return [{key: row[key] for key in row if key not in NOT_REPEATABLE} for row in rows(run_dir, "train")]


def assert_same_state(one: Path, other: Path) -> None:
    """Two checkpoint folders hold the same bits: weights, buffers, optimizer, scaler, average."""

    def same(a, b, where):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                same(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), where
            for i, pair in enumerate(zip(a, b, strict=True)):
                same(*pair, f"{where}[{i}]")
        else:
            assert a == b, where

    names = sorted(path.name for path in one.glob("*.pt"))
    assert names == sorted(path.name for path in other.glob("*.pt"))
    for name in names:
        same(*(torch.load(path / name, weights_only=True) for path in (one, other)), name)


def checkpoint_at(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:09d}"
