"""A small training job under torchrun that is started again and again on one run folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from pipeline.errors import TransientError
from pipeline.insight.chaos.faults import descendants, send
from pipeline.progress import Progress
from pipeline.run_paths import RunPaths
from pipeline.tracking.ledger_rows import read_rows

BATCH, CLASSES, PER_CLASS = 16, 4, 24
TIMEOUT_S = 300.0  # without any progress
POLL_S = 0.004


def recipe(steps: int, model: str, device: str, wandb: str) -> dict:
    """A tiny run that saves, prunes and evaluates all the time. Epochs end inside batches. On a CPU
    it is in fp32, because many have no fast bf16."""
    epoch = CLASSES * PER_CLASS / BATCH
    on_cpu = device == "cpu" or not torch.cuda.is_available()
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
            "precision": "fp32" if on_cpu else "bf16",
            "deterministic": True,
        },
        "checkpoint": {"every_steps": 3, "every_minutes": None},
        "tracking": {"wandb": wandb, "print_every_s": 3600.0, "report": False},
    }


class Job:
    """A training command, its processes and its run folder.

    Args:
        work: folder that holds recipe.yaml and data; run folder and log go there too.
        name: of the run folder and of the log.
        processes: ranks.
    """

    def __init__(self, work: Path, name: str, processes: int):
        self.run, self.log = work / name, work / f"{name}.log"
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        train = ["-m", "pipeline", "train", "--config", str(work / "recipe.yaml"), "--run_dir", str(self.run)]
        self.command = [sys.executable, *launcher, *train, "--data.root", str(work / "data")]
        self._process: subprocess.Popen | None = None
        self.children: list[int] = []  # process ids below torchrun, when a fault was injected
        self._read: tuple[tuple, list[dict]] = ((), [])  # the ledger's size and time, and its rows

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    @property
    def process(self) -> subprocess.Popen:
        """torchrun's process; `start` comes first."""
        assert self._process is not None
        return self._process

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def has_finished(self) -> bool:
        return RunPaths(self.run).finished.exists()

    def wait_for_all(self) -> None:
        """Wait until torchrun and every process below it have ended. Raises TransientError after `TIMEOUT_S`."""
        begun = time.monotonic()
        while not self.has_ended() or any(Path(f"/proc/{pid}").exists() for pid in self.children):
            if time.monotonic() > begun + TIMEOUT_S:
                raise TransientError(f"a job did not end within {TIMEOUT_S:.0f} s; its output is in {self.log}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Kill every process that is left."""
        if not self.has_ended():
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
        """The step of the ledger's last training row; 0 without any."""
        return max((row["step"] for row in self.rows("train")), default=0)

    def run_to_end(self, progress: Progress) -> float:
        """Start the job and wait for its end. Returns the seconds from its start to its first training row.

        Raises TransientError where it fails.
        """
        self.start()
        begun, start_s = time.monotonic(), None
        while not self.has_ended():
            step = self.last_step()
            if step and start_s is None:
                start_s = time.monotonic() - begun
            progress.advance(step - progress.count)
            time.sleep(0.05)
        if self.process.returncode:
            raise TransientError(f"the reference run ended with {self.process.returncode}; see {self.log}")
        return start_s or time.monotonic() - begun
