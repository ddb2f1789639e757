"""How long the lectures' recipes take on one CPU core: a training step and a scored batch of each, times their number.

    python benchmarks/lecture_times.py [--steps 3] [--json FILE] [--recipes NAME ...]

The step is the run's own (network, autocast, loss, optimizer), on one thread and on images that are there already: what
is counted is this process's CPU time, which other work on the machine changes little. Decoding CIFAR-10 comes to a few
percent and is left out.
"""

import argparse
import sys
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOME))

import torch  # noqa: E402

from pipeline.config import parse_config  # noqa: E402
from pipeline.insight.bench.results import default_path, write_result  # noqa: E402
from pipeline.loader.stream import Batch  # noqa: E402
from pipeline.model.build import build_model  # noqa: E402
from pipeline.training.ranks.world import World  # noqa: E402
from pipeline.training.step import TrainStep, autocast  # noqa: E402

RECIPES = ("cifar10-vgg16-64", "cifar10-inception_v3-4", "cifar10-resnet18-128", "cifar10-densenet121-64")
IMAGES, SCORED = 50_000, 10_000


def measure(name: str, steps: int) -> dict:
    """CPU seconds of a recipe's training step and of a scored batch (the least of `steps`), and hours of the run."""
    config = parse_config(["--config", name])
    batch, epochs = config.train.global_batch_size, float(config.schedule.epochs)
    torch.manual_seed(0)
    train = TrainStep(build_model(config.model, 10), config, World(0, 1, 0, 1, torch.device("cpu")))
    side, scored_side = config.data.image_size, config.data.val_size
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8)
    resident = Batch(images, torch.randint(0, 10, (batch,)), torch.arange(batch))
    others = torch.randint(0, 256, (batch, scored_side, scored_side, 3), dtype=torch.uint8)
    step_s, scored_s = [], []
    for number in range(steps + 1):  # the first one sets up
        begun = time.process_time()
        train(resident, 1e-4, number)
        step_s.append(time.process_time() - begun)
    train.network.eval()
    for _ in range(steps):
        begun = time.process_time()
        with torch.no_grad(), autocast(torch.device("cpu"), config.train.precision):
            train.network(others)
        scored_s.append(time.process_time() - begun)
    least, scored = min(step_s[1:]), min(scored_s)
    epoch_s = least * IMAGES / batch + scored * SCORED / batch
    return {
        "batch": batch,
        "epochs": epochs,
        "step_cpu_s": [round(value, 2) for value in step_s[1:]],
        "scored_batch_cpu_s": [round(value, 2) for value in scored_s],
        "hours": round(epochs * epoch_s / 3600, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--json", type=Path, help="file for the result; default: runs/bench")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in given.recipes:
        found[name] = measure(name, given.steps)
        print(f"{name}: {found[name]['hours']} h", flush=True)
    path = given.json or default_path("lecture_times")
    write_result(path, "lecture_times", ["python", *sys.argv], {"recipes": found})


if __name__ == "__main__":
    main()
