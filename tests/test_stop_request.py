"""A request to stop that comes before the training is there to hear it is heard; one of an earlier start is not."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import runs

from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.recorder import RunRecorder
from pipeline.training.run_folder.folder import RunFolder
from pipeline.training.step import TrainStep


@pytest.mark.parametrize(
    "text, restart, stays",
    [
        ("7.0 USR1 from Slurm", None, True),
        ("7.1 USR1 from Slurm", "1", True),
        ("7.0 USR1 from Slurm", "1", False),  # of the attempt before
        ("6.0 USR1 from Slurm", None, False),  # of another job
        ("enough", None, False),
        ("", None, False),
    ],
)
def test_stop_file_at_the_start(tmp_path, monkeypatch, text, restart, stays):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restart is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    folder = RunFolder(tmp_path)
    folder.stop.write_text(text)
    (tmp_path / "interrupted").write_text("{}")
    folder.clear_marks()
    folder.clear_stop()
    assert folder.stop.exists() == stays
    assert not (tmp_path / "interrupted").exists()


def test_asked_while_all_is_loaded_there_is_no_warm_up(root, tmp_path, monkeypatch):
    """Compiling the first step takes minutes that a job told to go does not have."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setattr(TrainStep, "warm_up", lambda _: pytest.fail("warmed up"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").write_text("7.0 USR1 from Slurm")
    printed = runs.call(root, run, expect=75)
    assert "interrupted (7.0 USR1 from Slurm): no step is done yet" in printed
    assert (run / "interrupted").exists() and not runs.rows(run, "train")


def test_asked_before_the_index_is_built_the_marker_says_why(synthetic_root, tmp_path, monkeypatch):
    """The batch script reads there that the job is to be queued again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").write_text("7.0 USR1 from Slurm")
    runs.call(synthetic_root, run, "--data.index", str(tmp_path / "index"), expect=75)
    assert json.loads((run / "interrupted").read_text())["reason"] == "7.0 USR1 from Slurm"


@pytest.mark.parametrize(("text", "linked"), [("USR1 from Slurm", False), ("USR1 from Slurm", True), (None, False)])
def test_reason_and_seconds_are_the_stop_files_though_another_rank_saw_it_first(tmp_path, text, linked):
    stop, marked, events, said = StopRequest(install=False), [], [], []
    stop.watch(tmp_path / "stop")
    if text and linked:
        (tmp_path / "stop").symlink_to(text)
    elif text:
        (tmp_path / "stop").write_text(text)
    if text:
        now = time.time()
        os.utime(tmp_path / "stop", (now - 40, now - 40), follow_symlinks=False)
    recorder = SimpleNamespace(
        _require_saved=lambda what: None,
        event=lambda *names, **facts: events.append((facts["reason"], facts["seconds"])),
        ledger=SimpleNamespace(sync=lambda: None),
        folder=SimpleNamespace(mark=lambda name, **facts: marked.append((name, facts["reason"], facts["seconds"]))),
        console=SimpleNamespace(say=said.append),
    )
    RunRecorder.interrupt(recorder, 8, stop)
    ((reason, seconds),) = events
    assert reason == (text or "another rank was asked")
    assert seconds >= 40 if text else seconds == 0
    assert marked == [("interrupted", reason, round(seconds, 2))] and f", {seconds:.1f} s after the request" in said[0]


def test_a_limit_of_cpu_time_is_a_request_to_stop():
    """Grid Engine's s_cpu and `ulimit -St` send SIGXCPU some time before they kill."""
    before = signal.getsignal(signal.SIGXCPU)
    stop = StopRequest()
    try:
        assert signal.getsignal(signal.SIGXCPU) != before
        os.kill(os.getpid(), signal.SIGXCPU)
        assert stop.reason == "SIGXCPU"
    finally:
        stop.restore_handlers()
    assert signal.getsignal(signal.SIGXCPU) == before


def test_a_stop_file_from_the_future_is_of_now(tmp_path):
    """The clock of the node that wrote it is ahead."""
    stop = StopRequest(install=False)
    stop.watch(tmp_path / "stop")
    (tmp_path / "stop").write_text("enough")
    os.utime(tmp_path / "stop", (time.time() + 1e6,) * 2)
    before = time.monotonic()
    assert stop and before <= stop.since <= time.monotonic()


def test_an_empty_stop_file_from_the_future_counts_a_second_after_it_was_seen(tmp_path, monkeypatch):
    """`touch stop` on a file server whose clock is ahead."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (time.time() + 3600,) * 2)
    stop = StopRequest(install=False)
    stop.watch(tmp_path / "stop")
    assert not stop
    now[0] += 1.5
    assert stop and stop.reason == "stop file"
