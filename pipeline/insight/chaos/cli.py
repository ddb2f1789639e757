"""The verb `chaos`: a small training job is disturbed again and again, and must end as if nothing had happened.

For trying a machine or a cluster before a long run: the real `train` under the real torchrun, on a made-up data set.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import yaml

from pipeline.command import run_command
from pipeline.errors import EXIT_OK, EXIT_RETRY, TransientError, UserError
from pipeline.insight.chaos.faults import LATEST, Disturbance, Moment, descendants, draw, send, strike
from pipeline.progress import Progress
from pipeline.run_paths import RunPaths
from pipeline.tracking.ledger import is_start, read_rows

BATCH, CLASSES, PER_CLASS = 16, 4, 24
PATIENCE_S = 300.0  # without any progress
LOOK_EVERY_S = 0.004


def recipe(steps: int, model: str, device: str, wandb: str) -> dict:
    """A tiny run that saves, prunes and evaluates all the time. Epochs end inside batches."""
    epoch = CLASSES * PER_CLASS / BATCH
    return {
        "data": {"image_size": 32, "val_size": 32, "val_resize": 36, "crop_area": [0.35, 1.0]},
        "model": {"name": model},
        "optim": {"lr": 0.02, "lr_batch_size": None},
        "schedule": {"name": "cosine", "epochs": (steps + 0.5) / epoch, "warmup_epochs": 0.5},
        "train": {
            "global_batch_size": BATCH,
            "eval_every_epochs": 9 / epoch,
            "max_steps": steps,
            "device": device,
            "deterministic": True,
        },
        "checkpoint": {"every_steps": 3, "every_minutes": None},
        "tracking": {"wandb": wandb, "print_every_s": 3600.0, "report": False},
    }


class Job:
    """A training command that is started again and again on one run folder."""

    def __init__(self, work: Path, name: str, processes: int):
        self.run, self.log = work / name, work / f"{name}.log"
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        train = ["-m", "pipeline", "train", "--config", str(work / "recipe.yaml"), "--run_dir", str(self.run)]
        self.command = [sys.executable, *launcher, *train, "--data.root", str(work / "data")]
        self.process: subprocess.Popen | None = None
        self.below: list[int] = []
        self._read: tuple[tuple, list[dict]] = ((), [])  # the ledger's size and time, and its rows

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def wait_for_all(self) -> None:
        """Wait until torchrun and every process below it are gone. Raises TransientError if they are not in time."""
        begun = time.monotonic()
        while not self.ended() or any(Path(f"/proc/{pid}").exists() for pid in self.below):
            if time.monotonic() > begun + PATIENCE_S:
                raise TransientError(f"a job did not end within {PATIENCE_S:.0f} s; its output is in {self.log}")
            time.sleep(LOOK_EVERY_S)

    def stop(self) -> None:
        """Leave no process behind."""
        if not self.ended():
            for pid in [*descendants(self.process.pid), self.process.pid]:
                send(pid, signal.SIGKILL)
            self.process.wait()

    def rows(self, kind: str) -> list[dict]:
        """The ledger's rows of a kind; read again only when the file has changed."""
        path = RunPaths(self.run).ledger
        if path.exists():
            facts = path.stat()
            stamp = facts.st_ino, facts.st_size, facts.st_mtime_ns
            if stamp != self._read[0]:
                self._read = stamp, list(read_rows(path))
        return [row for row in self._read[1] if row.get("kind") == kind]

    def last_step(self) -> int:
        return max((row["step"] for row in self.rows("train")), default=0)


class Chaos:
    """Disturbs `job` until its time has come, and starts it again after each fault that ends it."""

    def __init__(self, job: Job, evaluations: set[int], disturbances: list[Disturbance], progress: Progress):
        self.job, self.evaluations, self.progress = job, evaluations, progress
        self.waiting = list(reversed(disturbances))
        self.done: list[dict] = []
        self.lost: list[int] = []  # steps done again, for each fault
        self.recovery_s: list[float] = []  # from a fault to the first new training row
        self.struck: float | None = None  # when the fault that is being recovered from struck (time.time)
        self.step_at_strike = 0

    def evaluates(self) -> bool:
        step = self.job.last_step()
        return step in self.evaluations and all(row["step"] != step for row in self.job.rows("eval"))

    def run(self) -> None:
        """Until the run has finished. Raises TransientError where it ends or hangs by itself."""
        self.job.start()
        moment, moved, before = self.next_moment(), time.monotonic(), (-1, -1)
        while True:
            here = (len(self.job.rows("event")), self.job.last_step())
            if here != before:
                moved = time.monotonic()
                self.note_recovery(here[1])
                before = here
            if self.job.ended():
                if self.job.process.returncode == 0 and RunPaths(self.job.run).finished.exists():
                    return
                raise TransientError(f"a job ended by itself with {self.job.process.returncode}; see {self.job.log}")
            if time.monotonic() > moved + PATIENCE_S:
                raise TransientError(f"no step within {PATIENCE_S:.0f} s; see {self.job.log}")
            if moment is not None and moment.is_due():
                self.disturb(moment.what)
                moment, moved = self.next_moment(), time.monotonic()
            time.sleep(LOOK_EVERY_S)

    def next_moment(self) -> Moment | None:
        if not self.waiting:
            return None
        return Moment(self.waiting.pop(), self.job.run, self.job.last_step, self.evaluates)

    def disturb(self, what: Disturbance) -> None:
        """One fault; if it ended the job, the job is started again."""
        step = self.job.last_step()
        self.job.below = descendants(self.job.process.pid)
        begun = time.time()
        if strike(self.job.process.pid, what):
            self.job.wait_for_all()
            if not RunPaths(self.job.run).finished.exists():
                self.struck, self.step_at_strike = begun, self.job.last_step()
            self.job.start()
        self.done.append({"step": step, **asdict(what)})
        self.progress.advance()

    def note_recovery(self, step: int) -> None:
        """The first training row after a start ends a recovery."""
        if self.struck is None:
            return
        resumed = [row for row in self.job.rows("event") if is_start(row)]
        if resumed and resumed[-1]["time"] > self.struck and step > resumed[-1]["step"]:
            self.recovery_s.append(time.time() - self.struck)
            self.lost.append(max(0, self.step_at_strike - resumed[-1]["step"]))
            self.struck = None


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
    """Kill a small training job at random moments; it must end as if nothing had happened.

    Args:
        folder: new folder for data, runs and logs; give one on the file system that the long run will use.
        kills: faults: SIGKILL of a rank, of torchrun, of all; SIGTERM; SIGSTOP for a while.
        processes: ranks on this machine.
        seed: of the moments.
        model: a torchvision model.
        device: where to train.
        wandb: offline: also check that W&B's files have no step twice.
        json: also write the figures into this file.
    """
    if kills < 1 or processes < 1 or BATCH % processes:
        raise UserError(f"--kills {kills} --processes {processes}: give at least 1, and processes that divide {BATCH}")
    work = Path(folder).expanduser().resolve()
    if work.exists() and any(work.iterdir()):
        raise UserError(f"{work} is not empty; give a new folder")
    figures = try_run(work, kills, processes, seed, model, device, wandb)
    for name, value in figures.items():
        if name != "faults":
            print(f"  {name.replace('_', ' '):<22} {value}")
    if json:
        write_json(Path(json), figures)
    print("nothing was lost" if not figures["problems"] else f"problems; the runs are in {work}")
    return EXIT_RETRY if figures["problems"] else EXIT_OK


def write_json(path: Path, figures: dict) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n")


def try_run(work: Path, kills: int, processes: int, seed: int, model: str, device: str, wandb: str) -> dict:
    """The undisturbed run, the disturbed one, and what distinguishes them."""
    from pipeline.dataset.index.scan import build_index
    from pipeline.dataset.synthetic.generate import Settings, generate_tree

    work.mkdir(parents=True, exist_ok=True)
    generate_tree(work / "data", Settings(CLASSES, PER_CLASS, 6, seed=1, size=64, oddities=4))
    build_index(work / "data")
    steps = 16 + (LATEST + 3) * kills  # enough for all of them to strike
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe(steps, model, device, wandb)))
    calm = Job(work, "undisturbed", processes)
    begun = time.monotonic()
    with Progress("undisturbed run", steps, "steps") as progress:
        calm.start()
        try:
            start_s = watch(calm, progress)
        finally:
            calm.stop()
    calm_s = time.monotonic() - begun
    evaluations = {row["step"] for row in calm.rows("eval")}
    job, begun = Job(work, "disturbed", processes), time.monotonic()
    with Progress("disturbed run", kills, "faults") as progress:
        trial = Chaos(job, evaluations, draw(random.Random(seed), kills, start_s), progress)
        try:
            trial.run()
        finally:
            job.stop()
    from pipeline.insight.chaos import compare as same_run

    problems = same_run.compare_weights(job.run, calm.run) + same_run.compare_ledgers(job.run, calm.run)
    problems += same_run.check_samples(job.run) + same_run.check_files(job.run, calm.run)
    if wandb != "disabled":
        problems += same_run.check_wandb(job.run)
    return {
        "faults_survived": len(trial.done),
        "faults_asked_for": kills,
        "by_way": dict(Counter(fault["way"] for fault in trial.done)),
        "by_phase": dict(Counter(fault["phase"] for fault in trial.done)),
        "steps": steps,
        "processes": processes,
        "model": model,
        "seed": seed,
        "undisturbed_s": round(calm_s, 1),
        "disturbed_s": round(time.monotonic() - begun, 1),
        "start_s": round(start_s, 1),
        "longest_recovery_s": round(max(trial.recovery_s, default=0.0), 1),
        "steps_done_again": sum(trial.lost),
        "most_steps_done_again": max(trial.lost, default=0),
        "problems": problems,
        "faults": trial.done,
    }


def watch(job: Job, progress: Progress) -> float:
    """Wait for a job's end. Returns the seconds from its start to its first training row."""
    begun, start_s = time.monotonic(), None
    while not job.ended():
        step = job.last_step()
        if step and start_s is None:
            start_s = time.monotonic() - begun
        progress.advance(step - progress.count)
        time.sleep(0.05)
    if job.process.returncode:
        raise TransientError(f"the undisturbed run ended with {job.process.returncode}; see {job.log}")
    return start_s or time.monotonic() - begun


def main(argv: list[str]) -> int:
    return run_command(chaos, "chaos", argv)
