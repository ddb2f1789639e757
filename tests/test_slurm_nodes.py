"""The batch scripts on real Slurm clusters: a job that loses nodes and stays, and an evaluation that resumes."""

import json

import pytest
import slurm_cluster
from slurm_jobs import BATCH, EPOCH, Site, assert_whole

from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings, generate_tree

pytestmark = [pytest.mark.slurm, pytest.mark.long]
LONG = ("--schedule.epochs", "100", "--train.max_steps", "400", "--train.eval_every_epochs", "50")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    problem = slurm_cluster.why_not()
    if problem is not None:
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("slurm") / "data"
    generate_tree(
        folder, Settings(classes=4, train_per_class=EPOCH * BATCH // 4, val_per_class=64, size=40, oddities=0)
    )
    build_index(folder)
    return folder


@pytest.fixture
def site(data, tmp_path):
    with Site(tmp_path / "site", data, nodes=3) as site:
        yield site


def batches(job):
    return [(row["step"], row["batch_digest"], row["lr"]) for row in job.rows("train")]


def worlds(job):
    return [row["world_size"] for row in job.rows("event") if row["event"] in ("started", "resumed")]


def test_a_job_with_min_nodes_survives_the_loss_of_nodes(site):
    """Two of three nodes train, the third waits. One that trains loses its power: the third takes its place, in the
    same job. Then another: one is too few, and the batch shell requeues the job. At last the first, with the batch
    shell and the rendezvous: those that are left have it requeued."""
    places = ("--nodes=3", "--gpus-per-node=1", "--no-kill")
    job = site.submit(*places, arguments=LONG, MIN_NODES="2", SPARE_NODES="1", REJOIN_S="3")

    def lose(node, restarts, more=10):
        before = len(job.rows("train"))
        site.cluster.power_off(node)
        site.cluster.lose(node)
        if restarts:
            job.wait_restart(restarts)
            for off in set(site.cluster.nodes) - set(site.cluster.inits):
                site.cluster.power_on(off)
        job.wait(lambda: len(job.rows("train")) > before + more, "more steps")

    job.wait_steps(10)
    job.wait(lambda: "waits as a spare" in job.log, "a spare")
    in_training = next(line for line in job.log.splitlines() if "pipeline launch: round 1:" in line)
    first, second = ("n2", "n3") if "n2 (" in in_training else ("n3", "n2")
    lose(first, restarts=0)
    assert (worlds(job), job.restarts(), job.show("JobState")) == ([2, 2], 0, "RUNNING")
    lose(second, restarts=1)
    assert "requeued: a node was lost" in job.log
    lose("n1", restarts=2, more=2)
    site.cluster.run("scancel", job.id)  # what is done is enough to compare
    job.wait_end("CANCELLED")
    assert worlds(job) == [2, 2, 2, 2]
    places = ("--nodes=1", "--gpus-per-node=2")
    undisturbed = site.submit(*places, run="undisturbed", arguments=(*LONG, "--train.max_steps", "30"))
    undisturbed.wait_end("COMPLETED")
    assert batches(job)[:30] == batches(undisturbed) and len(batches(undisturbed)) == 30


def test_a_node_whose_network_was_away_joins_again(site):
    """For longer than its launcher waits: the other trains alone meanwhile."""
    length = ("--schedule.epochs", "1000", "--train.max_steps", "100000", "--train.eval_every_epochs", "1000")
    job = site.submit("--nodes=2", "--gpus-per-node=1", "--no-kill", arguments=length, MIN_NODES="1")
    job.wait_steps(5)
    way = ("blackhole", f"{site.cluster._address('n2')}/32")
    site.cluster.run("ip", "route", "add", *way, node="n1")
    job.wait(lambda: worlds(job) == [2, 1] and "not requeued yet" in job.node_log("n2"), "n2 is out of reach")
    site.cluster.run("ip", "route", "del", *way, node="n1")
    job.wait(lambda: worlds(job) == [2, 1, 2], "n2 is back")
    before = len(job.rows("train"))
    job.wait(lambda: len(job.rows("train")) > before + 5, "more steps")
    assert job.restarts() == 0 and "this node joins again" in job.node_log("n2")
    site.cluster.run("scancel", job.id)
    job.wait_end("CANCELLED")
    steps = [step for step, *_ in batches(job)]
    assert steps == list(range(1, len(steps) + 1))


def test_an_evaluation_that_is_interrupted_resumes(site):
    """USR1 ahead of the time limit, then TERM to the steps; the scores are those of an evaluation at one go."""
    run = site.submit("--nodes=1")
    run.wait_end("COMPLETED")
    assert_whole(run)
    sizes = ",".join(str(size) for size in range(32, 80, 4))
    scores = {}
    for name, interruptions in (("whole", 0), ("resumed", 2)):
        target = site.folder / f"{name}.json"
        arguments = ("--device", "cpu", "--batch_size", "1", "--sizes", sizes, "--json", str(target))
        job = site.submit("--nodes=1", script="evaluate.sh", run=name, RUN_DIR=str(run.run), arguments=arguments)
        for attempt in range(interruptions):
            many = len(list(run.run.glob("evaluation/*")))
            job.wait(lambda many=many: len(list(run.run.glob("evaluation/*"))) > many, "a part is scored")
            if attempt:
                site.cluster.run("scancel", "--signal=TERM", job.id)
            else:
                job.early_signal()
            job.wait_restart(attempt + 1)
        job.wait_end("COMPLETED")
        assert job.restarts() == interruptions
        scores[name] = [
            {key: value for key, value in row.items() if key != "images_per_s"}
            for row in json.loads(target.read_text())["results"]
        ]
    assert "batches were scored before" in job.log and not (run.run / "evaluation").exists()
    assert scores["resumed"] == scores["whole"] and len(scores["whole"]) == 12
