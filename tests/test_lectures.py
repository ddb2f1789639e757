"""benchmarks/lectures.sh: stopped and killed in the midst of a recipe it goes on, and leaves a whole ledger of each."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--data.image_size 32 --data.val_size 32 --data.val_resize 36 --train.precision fp32 --tracking.report false"
SMALL += " --train.global_batch_size 12 --train.eval_every_epochs 100 --checkpoint.every_steps 2"


def start(data: Path, out: Path) -> subprocess.Popen:
    recipes = "cifar10-resnet18-128 cifar10-densenet121-64"
    options = {"RECIPES": recipes, "TRAIN_OPTIONS": f"{SMALL} --train.max_steps 60"}
    return subprocess.Popen(
        ["bash", str(ROOT / "benchmarks/lectures.sh"), str(data), str(out)],
        cwd=ROOT,
        env=runs.environment() | options | {"PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop_at(run: Path, step: int, how: signal.Signals, job: subprocess.Popen) -> str:
    """SIGTERM to the script alone, SIGKILL to all its processes, once the run has recorded a step."""
    deadline = time.monotonic() + 240
    while len(runs.rows(run, "train")) < step and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)  # polls a condition
    assert job.poll() is None, job.communicate()[0][-3000:]
    if how == signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, how)
    else:
        job.send_signal(how)
    return job.communicate(timeout=120)[0]


@pytest.mark.long
@pytest.mark.slow
def test_the_lectures_script_is_stopped_killed_and_resumed(root, tmp_path):
    out = tmp_path / "out"
    first = out / "cifar10-resnet18-128"
    job = start(root, out)
    said = stop_at(first, 3, signal.SIGTERM, job)
    assert job.returncode == 75 and "the same command resumes it" in said, said[-2000:]
    reached = len(runs.rows(first, "train"))
    assert 3 <= reached < 60
    stop_at(first, reached + 4, signal.SIGKILL, start(root, out))
    job = start(root, out)
    assert job.wait(timeout=400) == 0, job.communicate()[0][-3000:]
    job.communicate()
    for recipe in ("cifar10-resnet18-128", "cifar10-densenet121-64"):
        with gzip.open(out / "ledgers" / f"{recipe}.jsonl.gz", "rt") as lines:
            rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 61))
        assert "val_top1" in [row for row in rows if row["kind"] == "eval"][-1]
    begun = time.monotonic()
    assert start(root, out).wait(timeout=60) == 0  # nothing is left to do
    assert time.monotonic() - begun < 5
