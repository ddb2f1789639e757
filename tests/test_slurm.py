"""The shipped batch scripts on real Slurm clusters: whatever ends a job, its run goes on to the very same weights.

Each story is the life of a job or two, on a cluster of its own. Jobs mostly wait, so some are told at the same time.
"""

import fcntl
import inspect
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import slurm_cluster
from slurm_jobs import BATCH, EPOCH, EVALUATED, STEPS, Job, Site, assert_alike, assert_whole, wandb_rows

from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.pack import pack
from pipeline.dataset.synthetic.generate import Settings, generate_tree

AT_ONCE = 4
Reference = Callable[[], Job]  # waits for the uninterrupted run
STORIES: dict[str, Callable[[Site, Reference], object]] = {}

pytestmark = pytest.mark.slurm


def story(function):
    STORIES[function.__name__] = function
    return function


@story
def from_submission_to_the_end(site: Site, _: Reference) -> Job:
    """2 nodes x 2 processes: every node's log, the table of preflight, and what `status` says on another node."""
    job = site.submit("--nodelist=n1,n2")
    job.wait_steps(4)
    seen = site.status(job, node="n3")
    assert (seen["state"], seen["slurm"]["state"], seen["slurm_job_id"]) == ("training", "RUNNING", job.id)
    assert (seen["last_step"], seen["world_size"]) == (STEPS, 4)
    job.wait_end("COMPLETED")
    assert_whole(job)
    assert json.loads((job.run / "finished").read_text())["step"] == STEPS
    assert sorted(path.name for path in (job.run / "logs").iterdir()) == [f"{job.id}-n1.log", f"{job.id}-n2.log"]
    assert "pass  nodes       2 nodes agree" in job.log
    return job


@story
def time_limit_term_requeue_and_a_killed_rank(site: Site, uninterrupted: Reference) -> None:
    """One job meets, one after the other: the time limit, twice; TERM to its steps, twice at once; an operator's
    requeue; and kill -9 of a rank, which the launcher starts again in place. W&B has one run, each step once."""
    job = site.submit(arguments=("--tracking.wandb", "offline"))
    for attempt in range(2):
        job.wait_steps(4)
        job.near_the_time_limit()
        job.wait_restart(attempt + 1)
        job.time_limit(60)
        assert site.status(job)["state"] == "preempted"
    job.wait_steps(4)
    for _ in range(2):
        site.cluster.run("scancel", "--signal=TERM", job.id)
    job.wait_restart(3)
    job.wait_steps(4)
    site.cluster.run("scontrol", "requeue", job.id)
    job.wait_restart(4)
    job.wait_steps(4)
    job.kill_a_worker()
    job.wait_end("COMPLETED")
    assert job.restarts() == 4 and len(job.events("resumed")) == 5
    assert_alike(job, uninterrupted())
    assert len({run.name.split("-")[-1] for run in job.run.glob("wandb/offline-run-*")}) == 1
    assert [row["_step"] for row in wandb_rows(job) if "loss" in row] == list(range(1, STEPS + 1))


@story
def preemption_and_lost_nodes(site: Site, uninterrupted: Reference) -> None:
    """A job of a higher priority takes the nodes; the slurmd of one of them dies, though its ranks live on; then the
    node that runs the batch script and rank 0 loses its power."""
    job = site.submit("--partition=low")
    job.wait_steps(4)
    urgent = site.cluster.sbatch("--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=site.folder)
    site.cluster.wait_state(urgent, "COMPLETED")
    job.wait_restart(1)
    assert "requeued: preempted by Slurm" in job.log
    job.wait_steps(4)
    assert job.nodes() == ["n1", "n2"]
    site.cluster.kill_slurmd("n2")
    site.cluster.lose("n2")
    job.wait_restart(2)
    job.wait_steps(4)
    assert job.nodes() == ["n1", "n3"]
    site.cluster.start_slurmd("n2")
    site.cluster.power_off("n1")
    site.cluster.lose("n1")
    job.wait_restart(3)
    job.wait_end("COMPLETED")
    assert job.nodes() == ["n2", "n3"]
    assert_alike(job, uninterrupted())


@story
def signals_at_awkward_moments(site: Site, uninterrupted: Reference) -> None:
    """While shards are copied to the nodes' own disks; twice while Python is being imported; and while evaluating."""
    packed, local = site.folder / "packed", site.folder / "local"
    assert pack(str(site.data), str(packed), processes=1) == 0
    local.mkdir()
    with (local / ".stage.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the copy waits for another one
        job = site.submit(DATA_ROOT=str(packed), STAGE_DIR=str(local))
        job.wait(lambda: "copying into it; waiting" in job.log, "staging")
        job.early_signal()
        job.wait_restart(1)
    job.wait_log("train --config")
    job.early_signal()
    job.early_signal()
    job.wait_restart(2)
    job.wait(lambda: site.state(job) == "evaluating", "evaluating")
    job.signal_workers("STOP")
    job.early_signal()
    job.wait_log("USR1 from Slurm")
    job.signal_workers("CONT")
    job.wait_restart(3)
    early, late = (row["step"] for row in job.events("interrupted"))
    assert early <= 2 and late == EVALUATED and not job.rows("eval")
    job.wait_end("COMPLETED")
    assert sorted(path.name for path in local.glob("*.tar")) == sorted(path.name for path in packed.glob("*.tar"))
    assert_alike(job, uninterrupted())


@story
def one_node_less_then_cancelled_then_submitted_again(site: Site, uninterrupted: Reference) -> None:
    """The same images in the same batches on half the processes; and a job that somebody cancelled stays cancelled."""
    job = site.submit()
    job.wait_steps(4)
    job.early_signal()
    job.wait_restart(1)
    site.cluster.wait_state(job.id, "PENDING")
    site.cluster.run("scontrol", "update", f"JobId={job.id}", "NumNodes=1", "NumTasks=1", "NumCPUs=1")
    job.wait_steps(4)
    assert job.events("resumed")[0]["world_size"] == 2
    site.cluster.run("scancel", job.id)
    job.wait_end("CANCELLED")
    saved = json.loads((job.run / "interrupted").read_text())["step"]
    assert saved >= 8 and (job.run / f"checkpoints/step-{saved:09d}/meta.json").exists()
    again = site.submit("--nodes=1")
    again.wait_end("COMPLETED")
    assert (job.show("JobState"), job.restarts()) == ("CANCELLED", 1)
    assert again.events("resumed")[-1]["step"] == saved
    assert_whole(again)

    def batches(run: Job):
        return [(row["step"], row["batch_digest"], row["lr"]) for row in run.rows("train")]

    assert batches(again) == batches(uninterrupted())


@story
def the_users_fault_and_a_crash_are_not_requeued(site: Site, _: Reference) -> None:
    """A typo fails in preflight; a loss that is no number fails when the launcher has tried as often as it may."""
    typo = site.submit("--nodelist=n1,n2", run="typo", arguments=("--optim.learning_rate", "0.1"))
    crash = site.submit("--nodelist=n3", "--nodes=1", run="crash", arguments=("--optim.lr", "1e30"), MAX_RESTARTS="0")
    typo.wait_end("FAILED")
    assert (typo.show("ExitCode"), typo.restarts()) == ("2:0", 0)
    assert "learning_rate" in typo.log and not (typo.run / "metrics.jsonl").exists()
    crash.wait_end("FAILED")
    assert (crash.show("ExitCode"), crash.restarts()) == ("1:0", 0)
    assert site.status(crash)["state"] == "failed"


#: The interpreter of a job: a rank on the node $BAD_NODE meets a GPU fault before its step 12.
FAULTY = """#!/bin/bash
[[ $* == *"pipeline launch"*train* ]] || exec {python} "$@"
args=("$@")
for i in "${{!args[@]}}"; do
    [[ ${{args[i]}} != train ]] || args[i - 1]="tests.inject gpu 0 12" # for -m pipeline train
done
exec {python} ${{args[@]}}
"""


@story
def a_gpu_fault_is_requeued_without_its_node(site: Site, uninterrupted: Reference) -> None:
    """Nothing is started again on the bad GPU; the job goes on from its checkpoint, on two other nodes."""
    faulty = site.folder / "python"
    faulty.write_text(FAULTY.format(python=sys.executable))
    faulty.chmod(0o755)
    job = site.submit(PYTHON=str(faulty), BAD_NODE="n1", MAX_RESTARTS="1")
    job.wait_restart(1)
    job.wait_end("COMPLETED")
    assert job.restarts() == 1 and job.show("ExcNodeList") == "n1"
    assert "requeued: a GPU of n1 failed" in job.log and "n1 is excluded" in job.log
    (fault,) = job.events("gpu_fault")
    assert (fault["fault_node"], fault["fault_step"], fault["excluded"]) == ("n1", 13, True)
    happened = [row["event"] for row in job.rows("event") if row["event"] != "straggler"]  # of a busy machine
    assert happened == ["started", "gpu_fault", "resumed", "finished"]
    assert_alike(job, uninterrupted())


@story
def three_requeues_without_a_new_step_stop_the_job(site: Site, _: Reference) -> None:
    job = site.submit("--nodes=1")
    for attempt in range(3):
        job.wait_log("preflight on")
        job.early_signal()
        job.wait_restart(attempt + 1)
    job.wait_end("FAILED")
    assert (job.show("ExitCode"), job.restarts()) == ("2:0", 3)
    assert "requeued 3 times without a new step" in job.log


@story
def a_second_job_and_a_checkpoint_that_takes_too_long(site: Site, _: Reference) -> None:
    """A second job in the same run folder is refused. Ranks that hang (here: stopped) when the signal comes are not
    waited for beyond the grace time: the job goes on from the checkpoint before. Somebody's stop file ends it."""
    job = site.submit("--nodes=1", GRACE_S="2")
    job.wait_steps(12)
    job.signal_workers("STOP")
    second = site.submit("--nodes=1")
    second.wait_end("FAILED")
    assert f"job {job.id} is at work in" in second.log
    job.early_signal()
    job.wait_restart(1)
    assert "not saved within 2 s" in job.log and not job.events("interrupted")
    job.wait_steps(4)
    assert job.events("resumed")[0]["step"] % 10 == 0
    (job.run / "stop").write_text("enough")
    job.wait_end("FAILED")
    assert (job.show("ExitCode"), job.restarts()) == ("75:0", 1)
    assert "stopped by" in job.log and site.status(job)["state"] == "stopped"
    steps = [row["step"] for row in job.rows("train")]
    assert steps == list(range(1, len(steps) + 1))


@story
def sweep_and_evaluate(site: Site, uninterrupted: Reference) -> None:
    """A run folder for each combination, each requeued on its own; and the scores of a run on all processes."""
    arguments = ("optim.lr=0.01,0.02", "train.seed=7", "--train.max_steps", "30")
    places = ("--array=0-1", "--nodes=1", "--gpus-per-node=8")  # a node for each task
    sweep = site.submit(*places, run="sweep", script="sweep.sh", arguments=arguments, NPROC_PER_NODE="2")
    last = Job(site.cluster, site.folder / "sweep/optim.lr=0.02,train.seed=7", f"{sweep.id}_1")
    last.wait_steps(4)  # the array's last task, whose plain id is the array's
    last.early_signal()
    last.wait_end("COMPLETED")
    first = Job(site.cluster, last.run.parent / "optim.lr=0.01,train.seed=7", f"{sweep.id}_0")
    first.wait_end("COMPLETED")
    assert (first.run / "finished").exists() and (last.run / "finished").exists()
    assert (len(first.events("resumed")), len(last.events("resumed"))) == (0, 1)

    scores = site.folder / "scores.json"
    arguments = ("--checkpoint", "last", "--json", str(scores), "--device", "cpu")
    reference = uninterrupted()
    evaluated = site.submit(script="evaluate.sh", arguments=arguments, run="evaluated", RUN_DIR=str(reference.run))
    evaluated.wait_end("COMPLETED")
    assert json.loads(scores.read_text())["val_top1"] == reference.rows("eval")[-1]["val_top1"]
    assert (reference.run / "finished").exists()


#: Keeps a port of its node busy.
LISTENER = "import os, socket, time; s = socket.create_server(('', 10001)); os.fork() and os._exit(0); "
LISTENER += "os.closerange(0, 3); time.sleep(3600)"

HOSTS = ("127.0.0.1", "127.0.0.1", "10.77.0.1", "10.77.0.1")

RECORDER = """#!/bin/bash
if [[ $* == *"pipeline launch"* ]]; then
    echo "$SLURMD_NODENAME $IN_CONTAINER $BY_SRUN $OMP_NUM_THREADS $*" >>"$RUN_DIR/calls"
    touch "$RUN_DIR/finished"
elif [[ $1 == -c ]]; then # the count of cores
    exec PYTHON "$@"
else
    echo "$*" >>"$RUN_DIR/preflight"
    echo '{"node": "any"}'
fi
"""


@story
def shapes_and_the_site_file(site: Site, _: Reference) -> None:
    """What the launcher is told on 1 x 1, 1 x 8 and 3 x 8 GPUs and in a rehearsal on CPUs, the same script and site
    file for all: here an interpreter that writes it down."""
    recorder, settings = site.folder / "python", site.folder / "site.env"
    recorder.write_text(RECORDER.replace("PYTHON", sys.executable))
    recorder.chmod(0o755)
    options = "CONTAINER=(env IN_CONTAINER=yes)\nSRUN_OPTIONS=(--export=ALL,BY_SRUN=yes)\n"
    settings.write_text(f"PYTHON={recorder}\n{options}")
    site.cluster.run(sys.executable, "-c", LISTENER, node="n1")
    cores, endpoints = len(os.sched_getaffinity(0)), []
    for nodes, processes, places, env in [
        (1, 1, ("--nodes=1", "--gpus-per-node=1"), {}),
        (1, 8, ("--nodes=1", "--gpus-per-node=8"), {}),
        (3, 8, ("--nodes=3", "--gpus-per-node=8"), {}),
        (2, 4, ("--nodes=2", "--gpus-per-node=0", "--mincpus=16"), {"NPROC_PER_NODE": "4", "BENCH": "/b.json"}),
    ]:
        job = site.submit(*places, run=f"{nodes}x{processes}", SITE_ENV=str(settings), **env)
        job.wait_end("COMPLETED")
        calls = sorted(line.split() for line in (job.run / "calls").read_text().splitlines())
        assert [call[:3] for call in calls] == [[f"n{i}", "yes", "yes"] for i in range(1, nodes + 1)]
        assert {int(call[3]) for call in calls} == {max(1, min(cores, 16 if env else 8 * processes) // processes)}
        assert len({tuple(word for word in call[4:] if "--rdzv-conf=" not in word) for call in calls}) == 1
        assert ["--rdzv-conf=is_host=1" in call for call in calls] == [True] + [False] * (nodes - 1)
        options = dict(word.split("=", 1) for word in calls[0] if word.startswith("--") and "=" in word)
        assert (options["--nnodes"], options["--nproc-per-node"]) == (f"{nodes}:{nodes}", str(processes))
        endpoints.append(options["--rdzv-endpoint"])
        asked = (job.run / "preflight").read_text().splitlines()
        assert all(("--bench /b.json" in line) == ("BENCH" in env) for line in asked)
        assert f"--world_size {nodes * processes}" in asked[-1]
    ports = (10002, 10002, 10003, 10004)  # a job's own, or the next free
    assert endpoints == [f"{host}:{port}" for host, port in zip(HOSTS, ports, strict=True)]


@pytest.fixture(scope="module")
def told(request, tmp_path_factory):
    """The wanted stories, begun: name -> what comes of it."""
    problem = slurm_cluster.why_not()
    if problem is not None:
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("slurm")
    data = folder / "data"
    generate_tree(data, Settings(classes=4, train_per_class=EPOCH * BATCH // 4, val_per_class=64, size=40, oddities=0))
    build_index(data)
    names = {item.callspec.params["name"] for item in request.session.items if item.function is test_story}
    futures: dict[str, Future] = {}
    reference = from_submission_to_the_end.__name__

    def tell(name: str):
        with Site(folder / name, data, nodes=3) as site:
            return STORIES[name](site, lambda: futures[reference].result())

    if any("uninterrupted" in inspect.signature(STORIES[name]).parameters for name in names):
        names.add(reference)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name in filter(names.__contains__, STORIES):  # the reference first: others wait for it
            futures[name] = pool.submit(tell, name)
        yield futures
        for future in futures.values():
            future.cancel()


IN_EVERY_LANE = ("from_submission_to_the_end", "time_limit_term_requeue_and_a_killed_rank")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_EVERY_LANE else pytest.mark.long) for name in STORIES]
)
def test_story(told, name):
    told[name].result()
