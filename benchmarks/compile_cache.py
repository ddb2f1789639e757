"""What the second start of a compiled run saves, with torch.compile's caches in the run folder.

    python benchmarks/compile_cache.py [--model resnet18] [--rounds 3] [--json FILE]

CPU seconds (user and system, with children) of `pipeline train --train.compile` for one step on a CPU: a first start
with an empty cache, and one after its checkpoint is removed, in turns with the same start without compiling.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.insight.bench.loops import make_data
from pipeline.insight.bench.results import default_path, write_result


def start(run: Path, data: Path, model: str, *options: str) -> float:
    """CPU seconds of a start that trains one step."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    sizes = [
        "--data.image_size",
        "32",
        "--data.val_size",
        "32",
        "--data.val_resize",
        "36",
        "--data.loader",
        "reference",
    ]
    command = [sys.executable, "-m", "pipeline", "train", "--config", "smoke", "--model.name", model, *sizes]
    command += ["--data.root", str(data), "--run_dir", str(run), "--train.global_batch_size", "8", *options]
    command += ["--train.max_steps", "1", "--train.device", "cpu", "--tracking.report", "false"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=os.environ | {"WANDB_MODE": "disabled"}, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="What the second start of a compiled run saves.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the result; default: runs/bench")
    options = parser.parse_args()
    seen: dict[str, list[float]] = {"not compiled": [], "first start": [], "second start": []}
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        data = make_data(home / "data", 16)
        for _ in range(options.rounds):
            seen["not compiled"].append(start(home / "plain", data, options.model))
            shutil.rmtree(home / "run", ignore_errors=True)
            seen["first start"].append(start(home / "run", data, options.model, "--train.compile"))
            seen["second start"].append(start(home / "run", data, options.model, "--train.compile"))
    medians = {name: round(statistics.median(values), 2) for name, values in seen.items()}
    extra = {name: medians[name] - medians["not compiled"] for name in ("first start", "second start")}
    result = {
        "model": options.model,
        "rounds": options.rounds,
        "cpu_s": medians,
        "second_over_first_compiling": round(extra["second start"] / extra["first start"], 3),
    }
    print(json.dumps(result, indent=1))
    write_result(options.json or default_path("compile_cache"), "compile_cache", ["python", *sys.argv], result)


if __name__ == "__main__":
    main()
