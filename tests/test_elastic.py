"""Nodes are lost and join while a run trains: real launchers, real kills. Whatever happens, the run is the same run.

Each launcher stands for a node; the rendezvous is in a process of its own, as beside a batch script.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import runs
from launching import Job, descendants, kill, rank_pids, training, wait_for

from pipeline.__main__ import main
from pipeline.errors import EXIT_INTERRUPTED, EXIT_NODE_LOST, EXIT_STORE_LOST, TransientError
from pipeline.insight.chaos.compare import check_wandb, differences, wandb_steps
from pipeline.training.run_folder.checkpoint import load_state

ENDLESS = ["--schedule.epochs", "100000", "--train.global_batch_size", "24"]


def elastic(folder: Path, root: Path, nnodes: str, *options: str, nproc: int = 1, launch: tuple[str, ...] = ()) -> Job:
    options = options or tuple(ENDLESS)
    call = "--rdzv-conf=last_call_timeout=60"
    return Job(folder, training(root, folder / "run", *options), nnodes, call, *launch, nproc=nproc)


def trained(job: Job, more: int) -> None:
    """Wait until so many more steps are done than now."""
    run = job.folder / "run"
    have = last_step(run)
    wait_for(lambda: last_step(run) >= have + more, say=job.all_output)


def last_step(run: Path) -> int:
    found = runs.rows(run, "train")
    return found[-1]["step"] if found else 0


def sizes(run: Path) -> list[int]:
    """The world sizes that the run has had."""
    return [row["world_size"] for row in runs.rows(run, "event") if row["event"] in ("started", "resumed")]


def world_is(job: Job, size: int) -> None:
    """Wait until so many ranks train, and have done a step."""
    run = job.folder / "run"

    def does() -> bool:
        starts = [row for row in runs.rows(run, "event") if row["event"] in ("started", "resumed")]
        return bool(starts) and starts[-1]["world_size"] == size and last_step(run) > starts[-1]["step"]

    wait_for(does, say=job.all_output)


def assert_one_run(run: Path, root: Path, folder: Path, *options: str) -> None:
    """Each step once, with the images and the rate of a run that nothing happened to."""
    rows = runs.rows(run, "train")
    assert rows
    steps = [row["step"] for row in rows]
    assert steps == list(range(1, len(steps) + 1))
    undisturbed = folder / "undisturbed"
    length = ["--train.max_steps", str(len(steps))]
    runs.call(root, undisturbed, *training(root, undisturbed, *(options or ENDLESS))[7:], *length)
    for one, other in zip(rows, runs.rows(undisturbed, "train"), strict=True):
        assert (one["batch_digest"], one["lr"]) == (other["batch_digest"], other["lr"]), one["step"]


def stop(job: Job, name: str = "n1") -> None:
    job.processes[name].send_signal(signal.SIGTERM)
    assert job.wait(name) == EXIT_INTERRUPTED, job.all_output()


def test_a_lost_node_is_done_without_and_one_that_comes_is_taken_in(root, tmp_path):
    """2 -> 1 -> 2, by kill -9 of a launcher and its ranks, and a new launcher."""
    with elastic(tmp_path, root, "1:2") as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        world_is(job, 2)
        trained(job, 3)
        job.kill("n2")
        world_is(job, 1)
        job.start("n3")
        world_is(job, 2)
        trained(job, 3)
        stop(job)
        assert job.wait("n3") == job.wait("store") == EXIT_INTERRUPTED
        assert sizes(tmp_path / "run") == [2, 1, 2]
        reasons = [row["reason"] for row in runs.rows(tmp_path / "run", "event") if "reason" in row]
        assert "was lost" in reasons[0] and "joined" in reasons[1]
        assert not job.said("Traceback") and len(job.said("was lost in round 1")) == 1
    assert_one_run(tmp_path / "run", root, tmp_path)


@pytest.mark.long
def test_below_the_least_number_the_job_ends_and_the_next_start_resumes(root, tmp_path):
    with elastic(tmp_path, root, "2", launch=("--rejoin-timeout=1",)) as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        world_is(job, 2)
        job.kill("n1")
        assert job.wait("n2") == job.wait("store") == EXIT_NODE_LOST
        assert job.said("1 node left, 2 required")


@pytest.mark.long
def test_the_host_of_the_rendezvous_is_lost(root, tmp_path):
    with elastic(tmp_path, root, "1:2") as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        world_is(job, 2)
        job.kill("store")
        assert job.wait("n1", 60) == job.wait("n2", 60) == EXIT_STORE_LOST
        assert job.said("the host of the rendezvous, was lost; start the job again to resume")


@pytest.mark.long
def test_a_batch_that_three_do_not_divide_trains_on_two_with_a_spare(root, tmp_path):
    options = ["--schedule.epochs", "100000", "--train.global_batch_size", "16"]
    with elastic(tmp_path, root, "1:4", *options) as job:
        job.serve()
        for i in range(1, 5):
            job.start(f"n{i}")
        world_is(job, 4)
        job.kill("n4")
        world_is(job, 2)
        assert len(job.said("waits as a spare: a global batch of 16 is not divisible by more ranks")) == 1
        job.kill("n1")  # the spare takes its place
        wait_for(lambda: sizes(tmp_path / "run") == [4, 2, 2], say=job.all_output)
        world_is(job, 2)
    assert_one_run(tmp_path / "run", root, tmp_path, *options)


@pytest.mark.long
@pytest.mark.parametrize("attempt", range(5))
def test_three_from_two_loses_nobody(root, tmp_path, attempt):
    with elastic(tmp_path, root, "2:3") as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        job.start("n3")
        world_is(job, 3)
        job.kill("n3")
        world_is(job, 2)
        job.start("n4")
        world_is(job, 3)
        trained(job, 2)
        stop(job)
        assert job.wait("n2") == job.wait("n4") == EXIT_INTERRUPTED
        assert sizes(tmp_path / "run")[-3:] == [3, 2, 3]
    assert_one_run(tmp_path / "run", root, tmp_path)


@pytest.mark.long
def test_a_frozen_node_is_left_out_and_joins_again_when_it_wakes(root, tmp_path):
    """SIGSTOP of all its processes, that of rank 0 among them, which then must not write."""
    with elastic(tmp_path, root, "1:2") as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        world_is(job, 2)
        trained(job, 3)
        frozen = next(name for name in ("n1", "n2") if 0 in rank_pids(job.processes[name].pid))
        process = job.processes[frozen]
        pids = [process.pid, *descendants(process.pid)]
        for pid in pids:
            kill(pid, signal.SIGSTOP)
        world_is(job, 1)
        trained(job, 5)
        for pid in reversed(pids):  # the rank first
            kill(pid, signal.SIGCONT)
        world_is(job, 2)
        trained(job, 3)
        stop(job)
        assert job.wait("n2") == EXIT_INTERRUPTED
        assert job.said("no sign of life for 5 s") and job.said("was cut off from the others; it joins again")
    assert_one_run(tmp_path / "run", root, tmp_path)


@pytest.mark.long
def test_a_loss_after_growth_names_the_node_and_a_rank_that_dies_is_named(root, tmp_path, capsys):
    """Five starts of four worlds; W&B sees one run, each step at most once."""
    options = [*ENDLESS, "--tracking.wandb", "offline"]
    with elastic(tmp_path, root, "1:2", *options, launch=("--max-restarts=1",)) as job:
        job.serve()
        job.start("n1")
        job.start("n2")
        world_is(job, 2)
        job.kill("n2")
        world_is(job, 1)
        job.start("n3")
        world_is(job, 2)
        lost = job.processes["n3"].pid
        job.kill("n3")
        world_is(job, 1)
        assert job.said(rf"\(pid {lost}\) was lost in round 3")
        victim = rank_pids(job.processes["n1"].pid)[0]
        kill(victim, signal.SIGKILL)  # the rank, not its node: this one is a restart
        wait_for(lambda: job.said(rf"pid {victim}\) was killed by SIGKILL .*; restart 1 of 1"), say=job.all_output)
        wait_for(lambda: sizes(tmp_path / "run") == [2, 1, 2, 1, 1], say=job.all_output)
        world_is(job, 1)
        trained(job, 3)
        stop(job)
    assert not job.said("all ranks show signs of life")
    run = tmp_path / "run"
    sent = list(run.glob("wandb/offline-run-*"))
    assert len(sent) == 5 and len({path.name.split("-")[-1] for path in sent}) == 1
    assert not check_wandb(run) and len(wandb_steps(run)) > 5
    assert main(["status", str(run)]) == main(["report", str(run)]) == 0
    assert re.search(r"processes +2 from step 0, 1 from step \d+, 2 from step \d+, 1 from", capsys.readouterr().out)
    page = (run / "report" / "index.html").read_text()
    assert "Processes: 2 from step 0, 1 from step" in page and f"(pid {lost}) was lost" in page
    assert_one_run(tmp_path / "run", root, tmp_path)


@pytest.mark.long
def test_who_joins_during_an_evaluation_waits_for_its_end(root, tmp_path, monkeypatch):
    """It is neither cut off nor done twice."""
    monkeypatch.setenv("HOLD", str(tmp_path))
    options = ["--schedule.epochs", "4", "--train.global_batch_size", "24", "--train.eval_every_epochs", "1"]
    program = ["-m", "tests.inject", "hold", "0", "0", *training(root, tmp_path / "run", *options)]
    with elastic(tmp_path, root, "1:2", launch=("--rdzv-conf=last_call_timeout=0",)) as job:
        job.program = program
        job.serve()
        job.start("n1")
        wait_for(lambda: (tmp_path / "evaluating").exists(), say=job.all_output)
        job.start("n2")
        wait_for(lambda: job.said("the 1 rank save at their next step"), say=job.all_output)
        for _ in range(4):
            (tmp_path / "evaluating").unlink()
            wait_for(lambda: (tmp_path / "evaluating").exists() or job.processes["n1"].poll() is not None)
            if job.processes["n1"].poll() is not None:
                break
        assert job.wait("n1") == job.wait("n2") == 0, job.all_output()
    assert [row["step"] for row in runs.rows(tmp_path / "run", "eval")] == [4, 8, 12, 16]
    assert sizes(tmp_path / "run") == [1, 2]
    assert_one_run(tmp_path / "run", root, tmp_path, *options)


@pytest.mark.long
def test_two_ranks_a_node_and_the_launcher_alone_killed(root, tmp_path):
    with elastic(tmp_path, root, "1:2", nproc=2) as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        world_is(job, 4)
        below = descendants(job.processes["n2"].pid)
        job.processes["n2"].kill()  # its ranks die with it
        world_is(job, 2)
        wait_for(lambda: not [pid for pid in below if is_alive(pid)], 30)
        trained(job, 3)
        assert sizes(tmp_path / "run") == [4, 2]
    assert_one_run(tmp_path / "run", root, tmp_path)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.long
def test_a_run_that_lost_nothing_but_a_node_loses_a_second_of_work_at_most(root, tmp_path):
    """No checkpoint on the disk but the one at the end: what survives is in the memory of the node that is left."""
    with elastic(tmp_path, root, "1:2") as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        world_is(job, 2)
        run = tmp_path / "run"
        wait_for(lambda: local_steps(job), say=job.all_output)
        begun = time.monotonic()
        wait_for(lambda: time.monotonic() - begun > 3 and max(local_steps(job), default=0) > 5, say=job.all_output)
        done = last_step(run)
        job.kill("n2")
        world_is(job, 1)
        (resumed,) = (row for row in runs.rows(run, "event") if row["event"] == "resumed")
        assert 5 < resumed["step"] <= done + 2
    assert_one_run(run, root, tmp_path)


@pytest.mark.long
def test_the_snapshots_of_all_nodes_are_of_rank_0s_state(root, tmp_path):
    """BatchNorm's running statistics too, and their average, which each rank has of its own: any node may be the one
    that is left."""

    def states() -> list[dict]:
        """Of the newest step that both have a snapshot of."""
        paths = [{path.name: path for path in snapshots(job, name)} for name in ("n1", "n2")]
        both = sorted(paths[0].keys() & paths[1].keys())
        try:
            return [load_state(of_node[both[-1]], ("model", "optimizer", "ema")) for of_node in paths if both]
        except TransientError:  # removed meanwhile: a newer one is there
            return []

    read: list[dict] = []
    with elastic(tmp_path, root, "2", *ENDLESS, "--ema.decay", "0.9", "--ema.every_steps", "1") as job:
        job.serve()
        for name in ("n1", "n2"):
            job.start(name)
        wait_for(lambda: read.extend(states()) or len(read) >= 2, say=job.all_output)
    assert not differences(read[0], read[1])


def snapshots(job: Job, name: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"pipeline-{os.getuid()}-*-{job.processes[name].pid}-*/snapshots/step-*"))


def local_steps(job: Job) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in snapshots(job, "n1")]
