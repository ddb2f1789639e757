"""The verb `chaos`: faults are injected into a small training job, whose results must equal an uninterrupted run's.

For testing a machine or a cluster before a long run: the real `train` under the real torchrun, on generated data.
"""

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import yaml

from pipeline.command import run_command, terminated_like_interrupted
from pipeline.errors import EXIT_OK, EXIT_RETRY, UserError
from pipeline.insight.chaos.faults import MAX_STEPS_APART, draw_faults
from pipeline.insight.chaos.inject import FaultInjector
from pipeline.insight.chaos.job import BATCH, CLASSES, PER_CLASS, Job, recipe
from pipeline.progress import Progress


def chaos(
    folder: str,
    kills: int = 10,
    processes: int = 2,
    seed: int = 0,
    model: str = "shufflenet_v2_x0_5",
    device: Literal["auto", "cuda", "cpu"] = "auto",
    wandb: Literal["offline", "disabled"] = "disabled",
    json: str | None = None,
) -> int:
    """Kill a small training job at random moments, and compare its results with those of an uninterrupted run.

    Args:
        folder: new folder for data, runs and logs; give one on the file system that the long run will use.
        kills: number of faults: SIGKILL of a rank, of torchrun or of all processes; SIGTERM; SIGSTOP for a while.
        processes: ranks on this machine.
        seed: determines kinds and moments of the faults.
        model: a torchvision model.
        device: where to train.
        wandb: offline: also check that no step is twice in W&B's files.
        json: also write the results into this file.
    """
    if kills < 1 or processes < 1 or BATCH % processes:
        raise UserError(f"--kills {kills} --processes {processes}: give at least 1, and processes that divide {BATCH}")
    work = Path(folder).expanduser().resolve()
    if work.exists() and any(work.iterdir()):
        raise UserError(f"{work} is not empty; give a new folder")
    with terminated_like_interrupted():  # the job must not train on
        results = run_trial(work, kills, processes, seed, model, device, wandb)
    for name, value in results.items():
        if name != "faults":
            print(f"  {name.replace('_', ' '):<22} {value}")
    if json:
        write_json(Path(json), results)
    print("nothing was lost" if not results["problems"] else f"problems; the runs are in {work}")
    return EXIT_RETRY if results["problems"] else EXIT_OK


def write_json(path: Path, results: dict) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def run_trial(work: Path, kills: int, processes: int, seed: int, model: str, device: str, wandb: str) -> dict:
    """Run the job without faults and with faults, and compare the two. Times in seconds; `problems` are sentences."""
    from pipeline.dataset.index.scan import build_index
    from pipeline.dataset.synthetic.generate import Settings, generate_tree

    work.mkdir(parents=True, exist_ok=True)
    generate_tree(work / "data", Settings(CLASSES, PER_CLASS, 6, seed=1, size=64, oddities=4))
    build_index(work / "data")
    steps = 16 + (MAX_STEPS_APART + 3) * kills  # enough for all of them to be injected
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe(steps, model, device, wandb)))
    reference = Job(work, "reference", processes)
    begun = time.monotonic()
    with Progress("run without faults", steps, "steps") as progress:
        try:
            start_s = reference.run_to_end(progress)
        finally:
            reference.stop()
    reference_s = time.monotonic() - begun
    evaluations = {row["step"] for row in reference.rows("eval")}
    job, begun = Job(work, "faulted", processes), time.monotonic()
    with Progress("run with faults", kills, "faults") as progress:
        injector = FaultInjector(job, evaluations, draw_faults(random.Random(seed), kills, start_s), progress)
        try:
            injector.run()
        finally:
            job.stop()
    from pipeline.insight.chaos import compare

    problems = compare.compare_weights(job.run, reference.run) + compare.compare_ledgers(job.run, reference.run)
    problems += compare.check_samples(job.run) + compare.check_files(job.run, reference.run)
    if wandb != "disabled":
        problems += compare.check_wandb(job.run)
    return {
        "faults_survived": len(injector.injected),
        "faults_asked_for": kills,
        "by_kind": dict(Counter(fault["kind"] for fault in injector.injected)),
        "by_phase": dict(Counter(fault["phase"] for fault in injector.injected)),
        "steps": steps,
        "processes": processes,
        "model": model,
        "seed": seed,
        "reference_s": round(reference_s, 1),
        "faulted_s": round(time.monotonic() - begun, 1),
        "start_s": round(start_s, 1),
        "longest_recovery_s": round(max(injector.recovery_s, default=0.0), 1),
        "steps_done_again": sum(injector.lost_steps),
        "most_steps_done_again": max(injector.lost_steps, default=0),
        "problems": problems,
        "faults": injector.injected,
    }


def main(argv: list[str]) -> int:
    return run_command(chaos, "chaos", argv)
