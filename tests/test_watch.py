"""A rank that hangs, is suspended, has died or is slow is named in bounded time; ranks that differ do not start."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
import torch.distributed as dist

from pipeline.dataset.index.scan import build_index
from pipeline.errors import UserError
from pipeline.insight.chaos.faults import ranks
from pipeline.loader.source import Source
from pipeline.training.ranks.consistency import code_digest, refuse_differences
from pipeline.training.ranks.stragglers import WINDOW, Slow, Stragglers
from pipeline.training.ranks.watchdog import Watchdog

TINY = ["--model.name", "shufflenet_v2_x0_5", "--model.zero_init_residual", "false"]


@pytest.fixture
def pair(monkeypatch):
    """Two ranks' watches with one store, and what they would say at their end."""
    store = dist.PrefixStore("watch", dist.HashStore())
    one, other = (Watchdog(rank, 2, hang_timeout_s=0.5, store=store) for rank in (0, 1))
    one.names = other.names = ["rank 0 (n1, pid 7)", "rank 1 (n2, GPU 3, pid 8)"]
    said, ended = [], threading.Event()

    def end(self, message: str, own: bool) -> None:
        said.append((self.rank, message))
        self._ended.set()
        ended.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    yield one, other, said, ended
    one.close()
    other.close()


def test_a_rank_that_hangs_names_itself_and_what_it_reads(pair):
    one, other, said, ended = pair
    other.detail = lambda: "reading /data/a.JPEG for 9 s"
    one.start()
    other.start()
    other.phase("waiting for images", 12)
    with one.collective("the exchange of reports"):
        assert ended.wait(10)
    rank, message = said[0]
    assert rank == 1 and message.startswith("rank 1 (n2, GPU 3, pid 8) has been in step 12, waiting for images for ")
    assert "reading /data/a.JPEG" in message


def test_a_rank_without_a_sign_of_life_is_named_by_the_others(pair):
    one, other, said, ended = pair
    other.phase("waiting for images", 12)
    other._post(other._here())  # its last: the process is suspended, or its node is gone
    one.start()
    with one.collective("the exchange of reports"):
        assert ended.wait(10)
    assert said == [(0, "rank 1 (n2, GPU 3, pid 8) shows no sign of life, last seen in step 12, waiting for images")]


def test_one_that_may_take_long_is_waited_for(pair):
    one, other, said, ended = pair
    other.start()
    other.phase("rank 0's part (build)", limit_s=1000)
    one.start()
    with one.collective("waiting for rank 0"):
        assert not ended.wait(2)
    assert not said


def test_one_that_ended_is_named_with_its_reason(pair):
    one, other, said, ended = pair
    assert other.announce_exit("data root /data is gone") and not one.announce_exit("connection closed")
    one.start()
    with one.collective("the exchange of gradients"):
        assert ended.wait(10)
    assert said == [
        (0, "rank 1 (n2, GPU 3, pid 8) has ended: data root /data is gone; the others can't go on"),
    ]


def test_all_in_the_same_place_is_the_network(pair):
    one, other, said, ended = pair
    one.start()
    other.start()
    with one.collective("the exchange of gradients"), other.collective("the exchange of gradients"):
        assert ended.wait(10)
    assert "all ranks have been in the exchange of gradients" in said[0][1] and "network" in said[0][1]


def test_an_error_of_nccl_ends_a_wait_before_its_limit(pair, monkeypatch):
    """torch's own thread does not abort the process then, so that a GPU's fault can be reported."""
    monkeypatch.setattr("pipeline.training.ranks.watchdog.BEAT_S", 0.05)
    one, other, said, ended = pair
    one.hang_timeout_s = other.hang_timeout_s = 1000
    one.network_failed = lambda: True
    one.start()
    other.start()
    with other.collective("the exchange of gradients"), one.collective("the exchange of gradients"):
        assert ended.wait(10)
    assert said[0][1].startswith("NCCL has reported an error in the exchange of gradients") and "network" in said[0][1]


def test_a_long_wait_is_said_and_its_end(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.training.ranks.watchdog.WARN_AFTER_S", 0.2)
    watch = Watchdog(hang_timeout_s=1000)
    watch.detail = lambda: "reading /data/a.JPEG for 9 s"
    watch.phase("waiting for images", 3)
    watch._say_if_long(replace(watch._here(), age_s=31.0))
    watch._say_if_long(replace(watch._here(), age_s=32.0))
    watch.phase("waiting for images", 4)
    watch._say_if_long(watch._here())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: rank 0 has been in step 3, waiting for images for 31 s: reading /data/a.JPEG for 9 s"
    assert lines[1].startswith("rank 0 continued after") and len(lines) == 2


def test_stragglers_are_told_once():
    stragglers, told = Stragglers(4), []
    for step in range(4 * WINDOW):
        slow = 0.3 if step < 3 * WINDOW else 0.101  # by then it is as fast as the others
        told.append(stragglers.observe(torch.tensor([0.1, 0.1, slow, 0.1], dtype=torch.float64)))
    assert [i for i, item in enumerate(told) if item] == [WINDOW - 1]
    assert told[WINDOW - 1] == Slow(2, pytest.approx(0.3), pytest.approx(0.1))


def test_a_pause_of_a_rank_is_no_slowness():
    """As after `scontrol suspend`, by which the ranks stop at different places of a step."""
    stragglers = Stragglers(2)
    for step in range(2 * WINDOW):
        own = torch.tensor([0.1, 9.0 if step % WINDOW == 20 else 0.1], dtype=torch.float64)
        assert stragglers.observe(own) is None


SUSPENDED = """
import time
import torch.distributed as dist
from pipeline.training.ranks.watchdog import Watchdog
store = dist.PrefixStore("watch", dist.HashStore())
pair = [Watchdog(rank, 2, hang_timeout_s=1.0, store=store) for rank in (0, 1)]
for watch in pair:
    watch.start()
pair[1].phase("waiting for images", 3)
with pair[0].collective("the exchange of gradients"):
    print("ready", flush=True)
    time.sleep(0.5)
print("went on", flush=True)
time.sleep(0.3)  # three beats (a tenth of the limit each), at any of which a watchdog might complain
for watch in pair:
    watch.close()  # a thread that is within the store when Python ends would abort the process
"""


def test_a_job_that_was_suspended_does_not_count_as_hung():
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)  # three times the limit
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "went on\n")


def complaints(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("pipeline train: ")]


@pytest.mark.long
def test_a_suspended_rank_ends_the_job_within_the_time_and_is_named(root, tmp_path):
    run = tmp_path / "run"
    options = [*TINY, "--train.hang_timeout_s", "4", "--train.max_steps", "1000000", "--schedule.epochs", "100000"]
    process = subprocess.Popen(
        runs.command(root, run, *options, processes=2),
        env=runs.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(runs.rows(run, "train")) > 1, process)
        victim = next(pid for pid in ranks(process.pid) if b"RANK=1" in environment_of(pid))
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: (run / "failed").exists(), process)
        took = time.monotonic() - stopped
        os.kill(victim, signal.SIGCONT)  # else torchrun waits 30 s for it
        output, _ = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 1 and took < 30
    assert f"rank 1 ({socket.gethostname()}, pid {victim}) shows no sign of life, last seen in " in output
    assert "shows no sign of life" in json.loads((run / "failed").read_text())["message"]
    assert "train_until" in (run / "debug" / "rank-0-stacks.txt").read_text()
    record = json.loads((run / "debug" / "rank-0-collectives.json").read_text())
    assert "all_reduce" in record["entries"][-1]["profiling_name"] or "all_gather" in str(record["entries"][-1])


def wait_until(condition, process, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)  # polls a condition


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@pytest.mark.slow
def test_a_rank_that_died_is_named(root, tmp_path):
    run = tmp_path / "run"
    program = ["-m", "tests.inject", "die", "1", "2"]
    output = runs.train(root, run, *TINY, "--train.hang_timeout_s", "20", processes=2, program=program, expect=1)
    (line,) = complaints(output)
    assert "contact to the other ranks was lost: rank 1 (" in line and "has died, last seen in " in line
    assert json.loads((run / "failed").read_text())["exit_code"] == 1


def test_a_slow_rank_is_named_and_training_goes_on(root, tmp_path):
    run = tmp_path / "run"
    program = ["-m", "tests.inject", "slow", "1", "1"]
    length = ["--schedule.epochs", f"{WINDOW + 2}ba"]
    output = runs.train(root, run, *TINY, *length, processes=2, program=program)
    (row,) = (row for row in runs.rows(run, "event") if row["event"] == "straggler")
    assert (row["rank"], row["step"]) == (1, WINDOW) and row["own_s"] > 0.05
    assert f"warning: step {WINDOW}: rank 1 (" in output and "is slow" in output


def test_ranks_with_other_settings_refuse_to_start(root, tmp_path):
    run = tmp_path / "run"
    program = ["-m", "tests.inject", "differ", "1", "0"]
    output = runs.train(root, run, *TINY, processes=2, program=program, expect=1)
    (line,) = complaints(output)
    assert "the ranks differ: --optim.lr is 0.05 on rank 0 (" in line and "and 0.3 on rank 1 (" in line
    assert not (run / "metrics.jsonl").exists()


def test_other_code_and_another_data_set_are_named(monkeypatch, tmp_path):
    def gather(everyone, mine):
        everyone[:] = [mine, {**mine, "pipeline's code": "beef", "the data set's fingerprint": "abc"}]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    world = SimpleNamespace(size=2, watch=Watchdog(0, 2))
    facts = {"pipeline's code": code_digest(), "the data set's fingerprint": "xyz", "torch": "2"}
    with pytest.raises(UserError, match=r"code is \w{12} on rank 0 and beef on rank 1; .*fingerprint is xyz .* abc on"):
        refuse_differences(facts, world)


def put_pipe(path: Path) -> Path:
    """A pipe in a file's place; its folder looks as if nothing had changed."""
    before = path.parent.stat()
    path.unlink()
    os.mkfifo(path)
    os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


def test_a_file_system_that_hangs_stops_the_run_and_names_the_file(root, tmp_path):
    """Reading a pipe that nobody writes blocks as a dead network file system does."""
    data = shutil.copytree(root, tmp_path / "data")
    path = put_pipe(build_index(data).splits["train"].path(7))
    line, *_ = complaints(runs.train(data, tmp_path / "run", *TINY, "--train.hang_timeout_s", "12", expect=1))
    assert "waiting for images" in line and f"reading {path} for" in line and "counts as hung" in line


def test_a_file_system_that_hangs_for_a_while_is_waited_for(root, tmp_path):
    data = shutil.copytree(root, tmp_path / "data")
    split = build_index(data).splits["train"]
    content, path = split.path(7).read_bytes(), put_pipe(split.path(7))
    source = Source(split)
    coming = source.threads.pool.submit(source.read, 7)
    while not source.slowest():
        time.sleep(0.01)  # polls a condition
    assert str(path) in source.slowest()
    path.write_bytes(content)
    assert coming.result(10).tobytes() == content and source.slowest() == ""
    source.close()
