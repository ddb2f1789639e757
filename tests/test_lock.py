"""One job a run folder: the second is told who is there; a dead owner's lock is taken over, by one alone."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import runs

from pipeline.errors import UserError
from pipeline.training.run_folder import lock as module
from pipeline.training.run_folder.lock import RunLock


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(module, "STALE_S", 0.6)


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock of tmp_path."""
    program = (
        "import sys; from pathlib import Path; from pipeline.training.run_folder import lock; lock.HEARTBEAT_S = 0.05;"
        "lock.RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLURM_JOB_ID": "4711"},
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def elsewhere(path, **facts):
    """Make the lock look as if another machine had taken it."""
    found = json.loads(path.read_text()) | {"machine": "far boot ns", "host": "far", **facts}
    path.write_text(json.dumps(found))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_second_is_told_host_pid_and_job(owner, tmp_path):
    with pytest.raises(UserError) as refused:
        RunLock(tmp_path).acquire()
    message = str(refused.value)
    assert f"host {os.uname().nodename}, pid {owner.pid}, Slurm job 4711" in message and "--run_dir" in message
    assert files(tmp_path) == ["lock"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owners_lock_is_taken_over_at_once(owner, tmp_path, how):
    owner.send_signal(how)
    owner.wait()
    said = []
    lock = RunLock(tmp_path, said.append)
    lock.acquire()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid() and str(owner.pid) in said[0]
    lock.release()
    assert files(tmp_path) == []


def test_a_copy_of_a_folder_in_use_is_free_once_nobody_touches_its_lock(owner, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy2(tmp_path / "lock", copy)
    said = []
    lock = RunLock(copy, said.append)
    lock.acquire()
    assert json.loads((copy / "lock").read_text())["pid"] == os.getpid() and "a copy" in said[-1]
    lock.release()
    (copy / "lock").hardlink_to(tmp_path / "lock")  # touched: a file system whose numbers change
    moved = json.loads((tmp_path / "lock").read_text()) | {"inode": 1}
    (tmp_path / "lock").write_text(json.dumps(moved))
    with pytest.raises(UserError, match="in use"):
        RunLock(copy).acquire()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EIO, errno.ENOSYS])
def test_a_file_system_without_links_has_locks(tmp_path, monkeypatch, number):
    """EIO: as rclone's mounts say it."""

    def refuse(path, target):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert files(tmp_path) == ["lock"]
    lock.release()
    assert files(tmp_path) == []


def test_a_process_with_the_dead_owners_number_is_not_the_owner(owner, tmp_path):
    owner.kill()
    owner.wait()
    path = tmp_path / "lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 1}))  # lives, but began at another time
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_elsewhere_a_lock_that_is_touched_is_alive_whatever_its_clock_says(owner, tmp_path):
    path = tmp_path / "lock"
    elsewhere(path)
    os.utime(path, (0, time.time() + 1e6))  # the owner's heartbeat puts it right within a moment
    with pytest.raises(UserError, match="host far"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("ahead", [-1e6, 0.0, 1e6])
def test_elsewhere_a_lock_that_nobody_touches_is_taken_over_whatever_its_clock_says(owner, tmp_path, ahead):
    owner.kill()
    owner.wait()
    path = tmp_path / "lock"
    elsewhere(path)
    os.utime(path, (0, time.time() + ahead))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_slurm_restarts_a_job_only_after_its_end(owner, tmp_path, monkeypatch):
    elsewhere(tmp_path / "lock")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = RunLock(tmp_path)
    lock.acquire()
    assert owner.wait(30) == 1  # it finds its lock in other hands and writes no more
    lock.release()


def test_of_many_who_find_it_dead_one_takes_it(owner, tmp_path):
    owner.kill()
    owner.wait()
    locks = [RunLock(tmp_path, lambda _: None) for _ in range(16)]
    start, won = threading.Barrier(16), []

    def contend(lock):
        start.wait()
        try:
            lock.acquire()
            won.append(lock)
        except (UserError, OSError):
            pass

    threads = [threading.Thread(target=contend, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and files(tmp_path) == ["lock"]
    won[0].release()


def test_a_taker_that_died_in_the_midst_is_no_obstacle(owner, tmp_path):
    owner.kill()
    owner.wait()
    dead = json.loads((tmp_path / "lock").read_text())
    (tmp_path / f".lock.{dead['token']}").write_text(json.dumps(dead | {"token": "a-second-dead-one"}))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert files(tmp_path) == []


def test_the_run_that_is_refused_leaves_the_others_folder_alone(owner, tmp_path, synthetic_root):
    (tmp_path / "config.yaml").write_text("")
    output = runs.call(synthetic_root, tmp_path, expect=2)
    assert f"pid {owner.pid}" in output and "in use by" in output
    assert files(tmp_path) == ["checkpoints", "config.yaml", "lock"]
