"""Jobs of the shipped batch scripts on a cluster of their own, and what their runs must be like in the end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from slurm_cluster import Cluster, wait_for

from pipeline.insight.status.run_state import read_state
from pipeline.tracking.ledger_rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
STEPS, EPOCH, BATCH, EVALUATED = 72, 24, 16, 48
PATIENCE_S = 300  # for a busy machine
WORKER = "-u -m pipeline train"  # a rank's command line has this, the launcher's has not

#: A tiny recipe: 72 steps of a ShuffleNet in float32, saved now and then, evaluated after 48 and at the end.
RECIPE = """
data: {image_size: 32, val_size: 32, val_resize: 36, loader: reference}
model: {name: shufflenet_v2_x0_5}
optim: {name: sgd, lr: 0.02, lr_batch_size: null}
schedule: {name: cosine, epochs: 6}
train: {global_batch_size: 16, eval_batch_size: 2, eval_every_epochs: 2, max_steps: 72, precision: fp32, device: cpu}
checkpoint: {every_steps: 10}
tracking: {wandb: disabled, report: false, print_every_s: 1}
"""


class Job:
    """A submitted job and its run folder."""

    def __init__(self, cluster: Cluster, run: Path, identifier: str):
        self.cluster, self.run, self.id = cluster, run, identifier

    @property
    def log(self) -> str:
        path = self.run.parent / f"{self.run.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def node_log(self, node: str) -> str:
        """A node's part of the log."""
        path = self.run / f"logs/{self.id}-{node}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def rows(self, kind: str) -> list[dict]:
        return [row for row in read_rows(self.run / "metrics.jsonl") if row["kind"] == kind]

    def events(self, name: str) -> list[dict]:
        return [row for row in self.rows("event") if row["event"] == name]

    def show(self, field: str) -> str:
        """A field of `scontrol show job`."""
        return self.cluster.show(self.id)[field]

    def restarts(self) -> int:
        return int(self.show("Restarts"))

    def wait(self, condition, what: str):
        return wait_for(condition, PATIENCE_S, lambda: f"{what}\n{self.log}\n{self.cluster.show(self.id)}")

    def wait_steps(self, count: int) -> None:
        """Wait until the job's present attempt has done `count` steps."""

        def reached():
            rows = list(read_rows(self.run / "metrics.jsonl"))
            starts = [i for i, row in enumerate(rows) if row.get("event") in ("started", "resumed")]
            if not starts or int(rows[starts[-1]].get("slurm_restart_count", 0)) < self.restarts():
                return False
            return sum(row["kind"] == "train" for row in rows[starts[-1] :]) >= count

        self.wait(reached, f"{count} steps")

    def wait_log(self, text: str) -> None:
        """Wait until the batch script says `text` in the job's present attempt."""

        def said():
            return re.search(rf"job {self.id}\.{self.restarts()}\] [^\n]*{re.escape(text)}", self.log)

        self.wait(said, f"'{text}' in the log")

    def wait_restart(self, count: int) -> None:
        """Wait until the job has been requeued `count` times."""
        self.wait(lambda: self.restarts() >= count, f"restart {count}")

    def wait_end(self, *states: str) -> None:
        try:
            self.cluster.wait_state(self.id, *states, timeout_s=PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def early_signal(self) -> None:
        """What Slurm sends ahead of the time limit: USR1 to the batch shell."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.show("NodeList")).split()

    def time_limit(self, minutes: int) -> None:
        self.cluster.run("scontrol", "update", f"JobId={self.id}", f"TimeLimit={minutes}")

    def near_the_time_limit(self) -> None:
        """Bring the time limit so near that Slurm sends the signal that the script asks for. The ranks are held until
        it comes: Slurm looks every 30 s."""
        self.signal_workers("STOP")
        self.time_limit(5)
        self.wait_log("the time limit is near")
        self.signal_workers("CONT")

    def signal_workers(self, name: str) -> None:
        """Send a signal to every rank."""
        for node in self.nodes():
            self.cluster.run("pkill", f"-{name}", "-f", "--", WORKER, node=node)

    def kill_a_worker(self) -> None:
        """kill -9 of one rank, on the last of the nodes."""
        self.cluster.run("pkill", "-KILL", "--newest", "-f", "--", WORKER, node=self.nodes()[-1])


class Site:
    """A cluster, a data set and a folder for jobs; a context manager."""

    def __init__(self, folder: Path, data: Path, nodes: int = 2):
        self.folder, self.data, self.cluster = folder, data, Cluster(nodes)

    def __enter__(self) -> "Site":
        self.folder.mkdir()
        (self.folder / "tiny.yaml").write_text(RECIPE)
        self.cluster.__enter__()
        return self

    def __exit__(self, *_) -> None:
        self.cluster.__exit__()

    def submit(self, *options: str, run="run", script="resnet152.sh", arguments: tuple[str, ...] = (), **env) -> Job:
        """Submit a shipped script, on 2 nodes x 2 processes unless `options` say otherwise."""
        environment = {"PYTHON": sys.executable, "CONFIG": "tiny.yaml", "DATA_ROOT": str(self.data), "RUN_DIR": run}
        environment |= {"PIPELINE_HOME": str(ROOT), "SITE_ENV": "/dev/null"} | env
        places = ["--nodes=2", "--gpus-per-node=2", "--open-mode=append", f"--output={run}.log", *options]
        identifier = self.cluster.sbatch(*places, ROOT / "slurm" / script, *arguments, cwd=self.folder, env=environment)
        return Job(self.cluster, self.folder / run, identifier)

    def status(self, job: Job, node: str | None = None) -> dict:
        """What `pipeline status RUN --json` says, on any machine that sees the folder."""
        command = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "pipeline", "status", job.run, "--json"]
        return json.loads(self.cluster.run(*command, node=node))

    @staticmethod
    def state(job: Job) -> str:
        """What `status` takes the run to be at."""
        return read_state(job.run).state if (job.run / "config.yaml").exists() else "nothing"


def numbers(job: Job) -> list[tuple]:
    """What a run's ledger says of each step and evaluation, but for times."""
    keys = ("kind", "step", "loss", "lr", "grad_norm", "batch_digest", "val_loss", "val_top1", "images")
    rows = sorted(job.rows("train") + job.rows("eval"), key=lambda row: (row["step"], row["kind"]))
    return [tuple(row.get(key) for key in keys) for row in rows]


def weights(job: Job) -> dict[str, torch.Tensor]:
    """Weights, buffers and optimizer state in the end."""
    folder = job.run / f"checkpoints/step-{STEPS:09d}"
    state = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("model", "optimizer")}
    flat = dict(state["model"])
    for number, entry in state["optimizer"]["optimizer"]["state"].items():
        flat |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    return flat


def wandb_rows(job: Job) -> list[dict]:
    """What an offline W&B run holds, over all starts, in the order of the files."""
    rows = []
    for log in sorted(job.run.glob("wandb/offline-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows += [row for row in map(json.loads, shown.splitlines()) if row.get("type") == "history"]
    return [row["history"]["item"] for row in rows]


def assert_whole(job: Job) -> None:
    """Every step is in the ledger, once, in order."""
    assert [row["step"] for row in job.rows("train")] == list(range(1, STEPS + 1))


def assert_alike(job: Job, reference: Job) -> None:
    """The same steps, each once, with the same numbers, and the same bits in the end."""
    assert_whole(job)
    assert numbers(job) == numbers(reference)
    mine, theirs = weights(job), weights(reference)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
