"""From the start of a process to the first step after a resume, part by part; and how long the small verbs take.

python benchmarks/startup.py [--model resnet152] [--rounds 5]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.dataset.imagenet import TRAIN_IMAGES
from pipeline.errors import TransientError
from pipeline.insight.bench.interleaved import Spread, format_rows
from pipeline.insight.bench.results import default_path, write_result

LATE_STEP = 1_000_000


def startup(model: str, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Print the tables; the same as plain values. rounds: processes started for each figure."""
    scratch = Path(tempfile.mkdtemp(prefix="bench-startup-"))
    try:
        run = json.loads(_child("prepare", str(scratch), model, str(size), str(batch_size))[0])
        verbs = {
            "--help": ["-m", "pipeline", "--help"],
            "status RUN": ["-m", "pipeline", "status", run["run_dir"]],
            "import torch": ["-c", "import torch"],
            "import torchvision": ["-c", "import torchvision"],
            "import nvidia.dali": ["-c", "import nvidia.dali"],
            "python itself": ["-c", "pass"],
        }
        times = {name: _time_processes(argv, rounds) for name, argv in verbs.items()}
        print("seconds from start to end of a process: median, minimum, maximum; CPU seconds")
        print(format_rows({name: _line(spread, cpu) for name, (spread, cpu) in times.items()}))
        parts: dict[str, list[float]] = {}
        for _ in range(rounds):
            begun = time.time()
            for name, seconds in json.loads(_child("resume", run["config"], str(begun))[0]).items():
                parts.setdefault(name, []).append(seconds)
        spreads = {name: Spread.of(values) for name, values in parts.items()}
        print(f"\nfrom the start of the process to the first step after a resume ({model}), seconds")
        print(format_rows({name: _line(spread) for name, spread in spreads.items()}))
        plan = {name: Spread.of(values) for name, values in _time_plan(scratch / "index", rounds).items()}
        print(f"\nthe order of {TRAIN_IMAGES:,} samples, seconds (batches of 256)")
        print(format_rows({name: _line(spread) for name, spread in plan.items()}))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {
        "model": model,
        "processes": {name: {**s.as_dict(3), "cpu_s": round(cpu, 3)} for name, (s, cpu) in times.items()},
        "resume_parts": {name: s.as_dict(3) for name, s in spreads.items()},
        "plan": {name: s.as_dict(4) for name, s in plan.items()},
    }


def _line(spread: Spread, cpu: float | None = None) -> str:
    text = f"{spread.median:8.3f}   {spread.minimum:8.3f} {spread.maximum:8.3f}"
    return text if cpu is None else f"{text}    {cpu:8.3f}"


def _run(argv: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TransientError(f"startup: {' '.join(argv)[:80]}: {done.stderr.strip()[-300:]}")
    return done


def _time_processes(argv: list[str], rounds: int) -> tuple[Spread, float]:
    """Wall seconds, and the median of CPU seconds, of a process from start to end."""
    wall, cpu = [], []
    for _ in range(rounds):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        _run(argv)
        wall.append(time.perf_counter() - begun)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return Spread.of(wall), Spread.of(cpu).median


def _child(*arguments: str) -> list[str]:
    """The last line that this script prints, run in a process of its own with these arguments."""
    return _run(["-W", "ignore", __file__, *arguments]).stdout.splitlines()[-1:]


def _prepare(scratch: Path, model: str, size: int, batch: int) -> dict[str, str]:
    """A run of two steps with a checkpoint, to be resumed."""
    from pipeline.config import to_yaml
    from pipeline.insight.bench.loops import bench_config, open_trainer
    from pipeline.training.ranks.world import start_world

    config = bench_config(scratch, model, size, batch, "fp32", device="cpu")
    world = start_world(config.train)
    trainer = open_trainer(config, world)
    trainer.train_until(2)
    trainer.save()
    trainer.close()
    path = scratch / "bench.yaml"
    path.write_text(to_yaml(config))
    return {"run_dir": config.run_dir, "config": str(path)}


def _resume(path: str, begun: float) -> dict[str, float]:
    """Seconds of each part of a start, up to the end of the first step."""
    seconds: dict[str, float] = {}
    last = [begun]

    def lap(name: str) -> None:
        now = time.time()
        seconds[name], last[0] = now - last[0], now

    lap("python")
    from pipeline.config import load_config

    config = load_config(Path(path))
    lap("configuration")
    import torch

    lap("import torch")
    from pipeline.training.ranks.world import start_world

    world = start_world(config.train)
    lap("process group")
    from pipeline.training.loop import open_trainer
    from pipeline.training.ranks.stop_request import StopRequest
    from pipeline.training.setup import prepare_run

    lap("import the rest")
    setup = prepare_run(config, world, StopRequest(install=False))
    lap("run folder, index, plan, verified checkpoint")
    trainer = open_trainer(setup)
    lap("model, optimizer, load, loaders, ledger")
    trainer.warm_up()
    lap("warm-up")
    batch = next(trainer.train_stream.batches(trainer.step, trainer.step + 1))
    lap("first batch")
    trainer.train_step(batch, 0.1)
    lap("first step")
    seconds["all"] = time.time() - begun
    assert trainer.step == 2 and torch.is_tensor(batch.images)
    return seconds


def _time_plan(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds until a batch is planned: from a closed index, at the first step, an epoch's start, a late step."""
    import numpy as np

    from pipeline.config import DataConfig, TrainConfig
    from pipeline.dataset.index.index import RECORD, open_index
    from pipeline.dataset.index.write import write_index
    from pipeline.loader.plan import make_train_plan

    records = np.zeros(TRAIN_IMAGES, RECORD)
    records["width"], records["height"], records["shard"] = 500, 375, 0
    records["label"] = np.arange(TRAIN_IMAGES) * 1000 // TRAIN_IMAGES
    classes = [(f"n{i:08d}", "") for i in range(1000)]
    write_index(folder, folder, classes, {"train": (records, ["x"] * TRAIN_IMAGES)}, {"train": ["x.tar"]})
    taken: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = action()
        taken.setdefault(name, []).append(time.perf_counter() - begun)
        return result

    data, train = DataConfig(image_size=224).resolve(), TrainConfig(global_batch_size=256)
    for _ in range(rounds):
        index = timed("open the index", lambda: open_index(folder))
        plan = timed("make the plan", lambda i=index: make_train_plan(i, data, train))
        timed("first batch of a run", lambda p=plan: p.local(0))
        timed("first batch of the next epoch", lambda p=plan: p.local(p.epoch_end(1)))
        timed("first batch after a resume at step 1,000,000", lambda p=plan: p.local(LATE_STEP))
        timed("any other batch", lambda p=plan: p.local(LATE_STEP + 1))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet152", help="a torchvision classification model")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side")
    parser.add_argument("--batch_size", type=int, default=4, help="images a step; the step itself is not the point")
    parser.add_argument("--rounds", type=int, default=5, help="processes started for each figure")
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    result = startup(options.model, options.size, options.batch_size, options.rounds)
    write_result(options.json or default_path("startup"), "startup", ["python", *sys.argv], result)


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or [""]
    if what == "prepare":
        print(json.dumps(_prepare(Path(rest[0]), rest[1], int(rest[2]), int(rest[3]))), flush=True)
    elif what == "resume":
        print(json.dumps(_resume(rest[0], float(rest[1]))), flush=True)
    else:
        main()
    sys.stdout.flush()
    os._exit(0)  # do not wait for the loaders' threads
