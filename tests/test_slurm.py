"""The shipped batch scripts on a real Slurm cluster: whatever ends a job, its run goes on to the very same weights."""

import fcntl
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slurm_cluster import Cluster, wait_for

from pipeline.dataset.pack import pack
from pipeline.dataset.scan import build_index
from pipeline.dataset.synthetic import Settings, generate_tree
from pipeline.insight.run_state import read_state
from pipeline.tracking.ledger import read_rows

ROOT = Path(__file__).resolve().parent.parent
STEPS, EPOCH, BATCH = 96, 32, 16
PATIENCE_S = 300  # for a busy machine

#: A tiny recipe: 96 steps of a ShuffleNet in float32, saved now and then, evaluated after 64 and at the end.
RECIPE = """
data: {image_size: 32, val_size: 32, val_resize: 36, loader: reference}
model: {name: shufflenet_v2_x0_5}
optim: {name: sgd, lr: 0.02, lr_batch_size: null}
schedule: {name: cosine, epochs: 6}
train: {global_batch_size: 16, eval_batch_size: 1, eval_every_epochs: 2, max_steps: 96, precision: fp32, device: cpu}
checkpoint: {every_steps: 10}
tracking: {wandb: disabled, print_every_s: 1}
"""

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tree of 512 training and 256 validation images of 4 classes."""
    root = tmp_path_factory.mktemp("slurm") / "data"
    generate_tree(root, Settings(classes=4, train_per_class=EPOCH * BATCH // 4, val_per_class=64, size=40, oddities=0))
    build_index(root)
    return root


class Job:
    """A submitted job and its run folder."""

    def __init__(self, cluster: Cluster, run: Path, identifier: str):
        self.cluster, self.run, self.id = cluster, run, identifier

    @property
    def log(self) -> str:
        path = self.run.parent / f"{self.run.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def rows(self, kind: str) -> list[dict]:
        return [row for row in read_rows(self.run / "metrics.jsonl") if row["kind"] == kind]

    def events(self, name: str) -> list[dict]:
        return [row for row in self.rows("event") if row["event"] == name]

    def wait_steps(self, count: int) -> int:
        """Wait until `count` more steps are done than the last start began with; returns the step."""

        def reached():
            rows = list(read_rows(self.run / "metrics.jsonl"))
            starts = [i for i, row in enumerate(rows) if row.get("event") in ("started", "resumed")]
            if len(starts) <= self.restarts():
                return None
            since = [row["step"] for row in rows[starts[-1] :] if row["kind"] == "train"]
            return since[-1] if len(since) >= count else None

        return wait_for(reached, PATIENCE_S, lambda: f"{count} steps\n{self.log}\n{self.cluster.show(self.id)}")

    def wait_log(self, text: str) -> None:
        """Wait until the batch script says `text` in the job's present attempt."""
        wait_for(lambda: self.says(text), PATIENCE_S, lambda: f"{text}\n{self.log}")

    def says(self, text: str) -> bool:
        return re.search(rf"job {self.id}\.{self.restarts()}\] [^\n]*{re.escape(text)}", self.log) is not None

    def restarts(self) -> int:
        return int(self.cluster.show(self.id)["Restarts"])

    def wait_restart(self, count: int) -> None:
        """Wait until the job has been requeued `count` times."""
        wait_for(lambda: self.restarts() >= count, PATIENCE_S, lambda: f"restart {count}\n{self.log}")

    def early_signal(self) -> None:
        """What Slurm sends ahead of the time limit: USR1 to the batch shell."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)

    def wait_end(self, *states: str) -> None:
        try:
            self.cluster.wait_state(self.id, *states, timeout_s=PATIENCE_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def signal_to_exit_s(self) -> list[float]:
        return [row["seconds"] for row in self.events("interrupted")]


@pytest.fixture(scope="module")
def submit(cluster, data, tmp_path_factory):
    """Submit a shipped script, on 2 nodes x 2 processes unless told otherwise: submit(NAME, ...) -> Job."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "tiny.yaml").write_text(RECIPE)
    submitted = []

    def call(
        name: str, *options: str, script: str = "resnet152.sh", arguments: tuple[str, ...] = (), **env: str
    ) -> Job:
        environment = {"PYTHON": sys.executable, "CONFIG": str(folder / "tiny.yaml"), "DATA_ROOT": str(data)}
        environment |= {"PIPELINE_HOME": str(ROOT), "RUN_DIR": str(folder / name), "SITE_ENV": "/nonexistent"} | env
        places = ["--nodes=2", "--gpus-per-node=2", "--open-mode=append", f"--output={folder / name}.log", *options]
        identifier = cluster.sbatch(*places, ROOT / "slurm" / script, *arguments, cwd=folder, env=environment)
        submitted.append(identifier)
        return Job(cluster, folder / name, identifier)

    yield call
    for identifier in submitted:
        cluster.run("scancel", "--full", "--signal=KILL", identifier, check=False)
        cluster.run("scancel", identifier, check=False)


@pytest.fixture(scope="module")
def uninterrupted(submit) -> Job:
    """A run of 2 x 2 processes from its beginning to its end, with which the others are compared."""
    job = submit("uninterrupted")
    job.wait_end("COMPLETED")
    return job


def numbers(job: Job) -> list[tuple]:
    """What a run's ledger says of each step and evaluation, but for times."""
    keys = ("kind", "step", "loss", "lr", "grad_norm", "batch_digest", "val_loss", "val_top1", "images")
    rows = sorted(job.rows("train") + job.rows("eval"), key=lambda row: (row["step"], row["kind"]))
    return [tuple(row.get(key) for key in keys) for row in rows]


def weights(job: Job) -> dict[str, torch.Tensor]:
    folder = job.run / f"checkpoints/step-{STEPS:09d}"
    state = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("model", "optimizer")}
    flat = dict(state["model"])
    for number, entry in state["optimizer"]["optimizer"]["state"].items():
        flat |= {f"optimizer.{number}.{key}": value for key, value in entry.items()}
    return flat


def wandb_rows(run: Path) -> list[dict]:
    """What an offline W&B run holds, over all starts, in the order of the files."""
    rows = []
    for log in sorted(run.glob("wandb/offline-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows += [row for row in map(json.loads, shown.splitlines()) if row.get("type") == "history"]
    return [row["history"]["item"] for row in rows]


def assert_alike(job: Job, reference: Job) -> None:
    """The same steps, each once, with the same numbers, and the same bits in the end."""
    assert [row["step"] for row in job.rows("train")] == list(range(1, STEPS + 1))
    assert numbers(job) == numbers(reference)
    mine, theirs = weights(job), weights(reference)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_from_submission_to_the_end(uninterrupted):
    """2 nodes x 2 processes: every node's log, the table of preflight, and what `status` says."""
    job = uninterrupted
    assert [row["step"] for row in job.rows("train")] == list(range(1, STEPS + 1))
    assert json.loads((job.run / "finished").read_text())["step"] == STEPS
    assert job.events("started")[0]["world_size"] == 4
    assert sorted(path.name for path in (job.run / "logs").iterdir()) == [f"{job.id}-n1.log", f"{job.id}-n2.log"]
    assert "pass  nodes       2 answered alike" in job.log
    assert read_state(job.run).state == "finished"


def test_signal_term_requeue_and_a_killed_worker(submit, uninterrupted):
    """One job meets, one after the other: the signal ahead of the time limit, TERM to its steps, an operator's requeue
    without warning, and kill -9 of a worker, which torchrun starts again in place. W&B has one run, each step once."""
    job = submit("chain", arguments=("--tracking.wandb", "offline"))
    job.wait_steps(12)
    job.early_signal()
    job.wait_restart(1)
    job.wait_steps(12)
    job.cluster.run("scancel", "--signal=TERM", job.id)
    job.wait_restart(2)
    job.wait_steps(12)
    job.cluster.run("scontrol", "requeue", job.id)
    job.wait_restart(3)
    job.wait_steps(12)
    job.cluster.run("pkill", "-KILL", "--newest", "-f", "--", "-u -m pipeline train", node="n2")
    job.wait_end("COMPLETED")
    assert_alike(job, uninterrupted)
    assert job.restarts() == 3 and len(job.events("resumed")) == 4
    assert [row["_step"] for row in wandb_rows(job.run) if "loss" in row] == list(range(1, STEPS + 1))


def test_preemption_and_lost_nodes(submit, uninterrupted, cluster, tmp_path):
    """A job of a higher priority takes the nodes; the slurmd of one of them dies, though its ranks live on; then the
    node that runs the batch script and rank 0 loses its power."""
    job = submit("preempted", "--partition=low")
    job.wait_steps(12)
    urgent = cluster.sbatch("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=tmp_path, env={})
    cluster.wait_state(urgent, "COMPLETED")
    job.wait_restart(1)
    assert "requeued: preempted by Slurm" in job.log
    job.wait_steps(12)
    cluster.kill_slurmd("n2")
    cluster.lose("n2")
    job.wait_restart(2)
    job.wait_steps(12)
    assert cluster.show(job.id)["NodeList"] == "n[1,3]"
    cluster.start_slurmd("n2")
    cluster.power_off("n1")
    cluster.lose("n1")
    job.wait_restart(3)
    job.wait_end("COMPLETED")
    assert cluster.show(job.id)["NodeList"] == "n[2-3]"
    cluster.power_on("n1")
    assert_alike(job, uninterrupted)


def test_signals_at_awkward_moments(submit, uninterrupted, data, tmp_path):
    """While shards are copied to the nodes' own disks; twice while Python is being imported; and while evaluating."""
    packed, local = tmp_path / "packed", tmp_path / "local"
    assert pack(str(data), str(packed), processes=1) == 0
    local.mkdir()
    with (local / ".stage.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the copy waits for another one
        job = submit("awkward", DATA_ROOT=str(packed), STAGE_DIR=str(local))
        wait_for(lambda: "copying into it; waiting" in job.log, PATIENCE_S, lambda: f"staging\n{job.log}")
        job.early_signal()
        job.wait_restart(1)
    job.wait_log("train --config")
    job.early_signal()
    job.early_signal()
    job.wait_restart(2)
    wait_for(lambda: read_state(job.run).state == "evaluating", PATIENCE_S, lambda: f"evaluating\n{job.log}")
    job.early_signal()
    job.wait_restart(3)
    early, late = (row["step"] for row in job.events("interrupted"))
    assert early <= 2 and late == 64 and not job.rows("eval")
    job.wait_end("COMPLETED")
    assert_alike(job, uninterrupted)
    assert sorted(path.name for path in local.glob("*.tar")) == sorted(path.name for path in packed.glob("*.tar"))


def test_one_node_less_then_cancelled_then_submitted_again(submit, uninterrupted):
    """The same images in the same batches on half the processes; and a job that somebody cancelled stays cancelled."""
    job = submit("shrunk")
    job.wait_steps(12)
    job.early_signal()
    job.wait_restart(1)
    job.cluster.wait_state(job.id, "PENDING")
    job.cluster.run("scontrol", "update", f"JobId={job.id}", "NumNodes=1", "NumTasks=1", "NumCPUs=1")
    job.wait_steps(12)
    assert job.events("resumed")[0]["world_size"] == 2
    job.cluster.run("scancel", job.id)
    job.wait_end("CANCELLED")
    saved = json.loads((job.run / "interrupted").read_text())["step"]
    assert saved >= 24 and (job.run / f"checkpoints/step-{saved:09d}/meta.json").exists()
    again = submit("shrunk", "--nodes=1")
    again.wait_end("COMPLETED")
    assert job.cluster.show(job.id)["JobState"] == "CANCELLED" and job.restarts() == 1
    assert again.events("resumed")[-1]["step"] == saved

    def batches(run: Job):
        return [(row["step"], row["batch_digest"], row["lr"]) for row in run.rows("train")]

    assert batches(again) == batches(uninterrupted)


def test_a_typo_fails_once(submit):
    job = submit("typo", arguments=("--optim.learning_rate", "0.1"))
    job.wait_end("FAILED")
    shown = job.cluster.show(job.id)
    assert (shown["ExitCode"], shown["Restarts"]) == ("2:0", "0")
    assert "learning_rate" in job.log and not (job.run / "metrics.jsonl").exists()


def test_a_crash_is_not_requeued(submit):
    """A loss that is no number: torchrun tries again as often as it is allowed to, then the job has failed."""
    arguments = ("--optim.lr", "1e30", "--guard.nonfinite", "stop")
    job = submit("crash", "--nodes=1", arguments=arguments, MAX_RESTARTS="0")
    job.wait_end("FAILED")
    shown = job.cluster.show(job.id)
    assert (shown["ExitCode"], shown["Restarts"]) == ("1:0", "0")
    assert read_state(job.run).state == "failed"


def test_three_requeues_without_a_new_step_stop_the_job(submit):
    job = submit("fruitless", "--nodes=1")
    for attempt in range(3):
        job.wait_log("preflight on")
        job.early_signal()
        job.wait_restart(attempt + 1)
    job.wait_end("FAILED")
    assert (job.cluster.show(job.id)["ExitCode"], job.restarts()) == ("2:0", 3)
    assert "requeued 3 times without a new step" in job.log


def test_a_second_job_in_the_same_run_folder_is_refused(submit):
    first = submit("shared", "--nodes=1")
    wait_for((first.run / "lock").exists, PATIENCE_S, lambda: first.log)
    second = submit("shared", "--nodes=1")
    second.wait_end("FAILED")
    assert f"job {first.id} is at work in" in second.log
    assert first.cluster.show(first.id)["JobState"] == "RUNNING"
    first.cluster.run("scancel", first.id)


def test_a_checkpoint_that_takes_too_long_is_not_waited_for(submit):
    """Ranks that hang (here: stopped) when the signal comes: after the grace time the job goes, and goes on elsewhere
    from the checkpoint before."""
    job = submit("frozen", "--nodes=1", GRACE_S="2")
    job.wait_steps(12)
    node = job.cluster.show(job.id)["NodeList"]
    job.cluster.run("pkill", "-STOP", "-f", "--", "-u -m pipeline train", node=node)
    job.early_signal()
    job.wait_restart(1)
    assert "not saved within 2 s" in job.log and not job.events("interrupted")
    job.wait_end("COMPLETED")
    assert job.events("resumed")[0]["step"] % 10 == 0
    assert [row["step"] for row in job.rows("train")] == list(range(1, STEPS + 1))


def test_sweep_evaluate_and_pack(submit, uninterrupted, data, tmp_path):
    """The companions: a run folder for each combination, the scores of a run, shards by a job array."""
    sweep = submit(
        "sweep",
        *("--array=0-1", "--nodes=1"),
        script="sweep.sh",
        arguments=("optim.lr=0.1,0.2", "train.seed=7", "--train.max_steps", "20"),
    )
    shards = tmp_path / "shards"
    cpu = ("--nodes=1", "--gpus-per-node=0")
    parts = submit("pack", *cpu, "--array=1-2", script="pack.sh", SHARDS=str(shards))
    whole = submit("pack", *cpu, f"--dependency=afterok:{parts.id}", script="pack.sh", SHARDS=str(shards))
    scores = tmp_path / "scores.json"
    arguments = ("--checkpoint", "last", "--json", str(scores), "--device", "cpu")
    evaluated = submit("uninterrupted", "--nodes=1", script="evaluate.sh", arguments=arguments)
    for job in (whole, evaluated, sweep):
        job.wait_end("COMPLETED")
    assert (shards / "index/index.json").exists()
    assert json.loads(scores.read_text())["val_top1"] == uninterrupted.rows("eval")[-1]["val_top1"]
    wait_for(lambda: len(list(sweep.run.glob("*/finished"))) == 2, PATIENCE_S, lambda: sweep.log)
    assert sorted(path.name for path in sweep.run.iterdir()) == [
        "optim.lr=0.1,train.seed=7",
        "optim.lr=0.2,train.seed=7",
    ]
