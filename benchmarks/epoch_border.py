"""How long the training loop takes over an epoch's border, in units of a step.

    python benchmarks/epoch_border.py [--images 1281167] [--rounds 7] [--json FILE]

The loop of `pipeline train` with its real loader and plan; a few small images stand for all samples, so that the order
of 1.28 million has to be drawn but nothing large to be decoded. Measured from the beginning of an epoch's last step to
the beginning of the next epoch's first, over the median of the steps before it. "opened anew": without reading ahead
over the border and without drawing the next order in advance, in turns with it. Neither saving nor evaluation is due.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Config
from pipeline.insight.bench.loops import bench_config
from pipeline.insight.bench.results import default_path, write_result
from pipeline.loader.plan import ORDER_AHEAD_STEPS, make_train_plan
from pipeline.training import loop
from pipeline.training.milestones import Milestones
from pipeline.training.optim.lr_schedule import Schedule
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.world import start_world
from pipeline.training.setup import RunSetup, prepare_run
from pipeline.training.start import Start

STEPS_AHEAD = 10  # steps before those in which the next order is drawn


def enlarged(setup: RunSetup, config: Config, images: int) -> RunSetup:
    """The same run over so many samples, each one of the few that there are."""
    split = setup.index.splits["train"]
    records = np.array(split.records)[np.arange(images) % len(split)]
    index = dataclasses.replace(
        setup.index, splits=setup.index.splits | {"train": dataclasses.replace(split, records=records)}
    )
    plan = make_train_plan(index, config.data, config.train, config.augment)
    schedule = Schedule(config.schedule, 0.01, images / config.train.global_batch_size)
    milestones = Milestones(config, plan, schedule.total_steps)
    return dataclasses.replace(setup, index=index, plan=plan, schedule=schedule, milestones=milestones)


class Clocked:
    """The training step, which writes down when it begins."""

    def __init__(self, step: Any):
        self.step, self.begun = step, list[float]()

    def __call__(self, *arguments: Any) -> Any:
        self.begun.append(time.perf_counter())
        return self.step(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)


def cross(trainer: loop.Trainer, epoch: int, ahead: bool) -> tuple[float, float]:
    """(border in units of a step, seconds of a step) at the end of an epoch."""
    border = trainer.plan.epoch_end(epoch)
    trainer.take_state_of(Start(meta={"step": border - ORDER_AHEAD_STEPS - STEPS_AHEAD}))
    trainer.batches.last_step = trainer.milestones.last_step if ahead else 0
    trainer.plan.__dict__.pop("prepare_order", None)
    if not ahead:
        trainer.plan.__dict__["prepare_order"] = lambda step: None
    clocked = trainer.train_step = Clocked(trainer.train_step)  # type: ignore[assignment]
    trainer.train_until(trainer.milestones.next_pause(trainer.step))
    assert trainer.step == border
    trainer.train_until(border + 1)
    trainer.train_step = clocked.step
    between = np.diff(clocked.begun)
    step_s = statistics.median(between[:-1].tolist())
    return float(between[-1]) / step_s, step_s


def main() -> None:
    parser = argparse.ArgumentParser(description="The training loop over an epoch's border.")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file for the result; default: runs/bench")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        config = bench_config(Path(temporary), "resnet18", 32, 8, "fp32", eval_every_epochs=1e6, device="cpu")
        world = start_world(config.train)
        setup = enlarged(prepare_run(config, world, StopRequest(install=False)), config, options.images)
        trainer = loop.open_trainer(setup)
        found: dict[str, list[float]] = {"ahead": [], "opened anew": []}
        steps = []
        for number in range(2 * options.rounds + 2):
            name = "ahead" if number % 2 == 0 else "opened anew"
            ratio, step_s = cross(trainer, number + 1, name == "ahead")
            if number > 1:
                found[name].append(round(ratio, 3))
                steps.append(step_s)
        trainer.close()
        world.close()
    result = {
        "images": options.images,
        "step_ms": round(1e3 * statistics.median(steps), 1),
        "border_in_steps": {name: {"median": statistics.median(v), "all": v} for name, v in found.items()},
    }
    print(json.dumps(result, indent=1))
    write_result(options.json or default_path("epoch_border"), "epoch_border", ["python", *sys.argv], result)


if __name__ == "__main__":
    main()
