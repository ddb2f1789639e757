"""Whole runs by the command line: twice the same, killed and resumed, on fewer ranks."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings as Synthetic
from pipeline.dataset.synthetic.generate import generate_tree
from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK
from pipeline.insight.bench.overlap import measure_overlap
from pipeline.insight.chaos.compare import check_samples, compare_ledgers, compare_weights, rows_of
from pipeline.insight.qualify.rows import Row, Settings, judged, skipped
from pipeline.run_paths import RunPaths, list_checkpoints
from pipeline.training.cli import train

_STEPS = 6
_MICRO_BATCH = 8  # images whose BatchNorm statistics are taken together
#: BatchNorm's statistics over the same images on any number of ranks, and only sums in another order
_SAME_GROUPS = ["--train.micro_batch_size", str(_MICRO_BATCH), "--train.precision", "fp32"]
_MOST_OFF = 1e-3  # relative; sums of a few steps in another order
_BASE = ["--config", "smoke", "--model.name", "resnet18", "--data.image_size", "32", "--data.val_size", "32"]
_BASE += ["--data.val_resize", "36", "--train.global_batch_size", "16", "--train.max_steps", str(_STEPS)]
_BASE += ["--checkpoint.every_steps", "2", "--checkpoint.every_epoch", "false", "--train.deterministic"]
_BASE += ["--tracking.wandb", "disabled", "--tracking.report", "false"]


def repeat_and_resume(settings: Settings) -> Iterator[Row]:
    """With deterministic kernels: the same run twice, and runs that were killed and asked to stop."""
    data = _data(settings)
    whole = _train(settings, data, "whole")
    yield _same("the same run twice", _train(settings, data, "again"), whole)
    for name, number in (("SIGKILL", signal.SIGKILL), ("SIGTERM", signal.SIGTERM)):
        code = _stop_after_checkpoint(settings, data, name, number)
        allowed = (-signal.SIGKILL,) if number == signal.SIGKILL else (EXIT_OK, EXIT_INTERRUPTED)
        if code not in (*allowed, EXIT_OK):
            yield Row(f"{name}, then resumed", f"ended with exit code {code}", "saved and stopped", "FAIL")
            continue
        yield _same(f"{name}, then resumed", _train(settings, data, name), whole)


def elastic(settings: Settings) -> Iterator[Row]:
    """A run that is continued by half as many ranks sees the same images, and learns the same up to rounding."""
    ranks = settings.gpus if settings.device == "cuda" else 2
    if ranks < 2:
        yield skipped("half as many ranks", "one GPU")
        return
    data = _data(settings)
    same = [*_SAME_GROUPS, "--train.global_batch_size", str(_MICRO_BATCH * ranks)]
    whole = _train(settings, data, "many", ranks, *same)
    _train(settings, data, "fewer", ranks, *same, "--train.max_steps", "2")
    fewer = _train(settings, data, "fewer", ranks // 2, *same)
    losses = [[row["loss"] for row in rows_of(run, "train")] for run in (whole, fewer)]
    worst = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    found = check_samples(fewer)
    value = "; ".join(found) or f"same images, losses off by {worst:.1e} at most"
    bound = f"same images; at most {_MOST_OFF:g}"
    yield judged(f"{ranks} ranks, then {ranks // 2}", value, bound, not found and worst < _MOST_OFF)


def overlap(settings: Settings) -> Iterator[Row]:
    """How much of the exchange of gradients runs beside the backward pass, by a trace of a run on several ranks."""
    ranks = settings.gpus if settings.device == "cuda" else 2
    if ranks < 2:
        yield skipped("exchange of gradients", "one GPU")
        return
    run = _train(settings, _data(settings), "traced", ranks, "--train.profile_steps", "2")
    (trace,) = sorted(RunPaths(run).profile.glob("*.json*"))[:1]
    found = measure_overlap(trace)
    value = f"{found['exchange_ms']:,.1f} ms in 2 steps, {found['hidden_share']:.0%} beside computing"
    yield Row("exchange of gradients", value)


def _data(settings: Settings) -> Path:
    root = settings.scratch / "data"
    if not root.exists():
        generate_tree(root, Synthetic(classes=4, train_per_class=24, val_per_class=4, size=48, oddities=0))
        build_index(root)
    return root


def _command(settings: Settings, data: Path, name: str, ranks: int, *more: str) -> list[str]:
    program = ["-m", "pipeline", "train", *_BASE, "--train.device", settings.device]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *program, "--data.root", str(data), "--run_dir", str(settings.scratch / name), *more]


def _train(settings: Settings, data: Path, name: str, ranks: int = 1, *more: str) -> Path:
    """A run to its end. Returns its folder; raises RuntimeError where it fails. One rank trains in this process, which
    has all imports done; the runs that are disturbed are processes of their own."""
    if ranks == 1:
        command = _command(settings, data, name, 1, *more)
        code = train(command[command.index("train") + 1 :])
        if code:
            raise RuntimeError(f"training ended with exit code {code}")
        return settings.scratch / name
    done = subprocess.run(_command(settings, data, name, ranks, *more), capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"training ended with exit code {done.returncode}: {words}")
    return settings.scratch / name


def _stop_after_checkpoint(settings: Settings, data: Path, name: str, number: signal.Signals) -> int:
    """Start a run, send it a signal as soon as it has a checkpoint, and return its exit code."""
    folder = RunPaths(settings.scratch / name).checkpoints
    process = subprocess.Popen(_command(settings, data, name, 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder.exists() and list_checkpoints(folder)):
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait()


def _same(what: str, run: Path, whole: Path) -> Row:
    found = [*compare_ledgers(run, whole), *compare_weights(run, whole), *check_samples(run)]
    return judged(what, "; ".join(found) or "ledger and weights are the same, bit for bit", "the same", not found)
