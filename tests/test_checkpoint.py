"""Checkpoints are written whole or not at all, and a damaged one is never loaded."""

import contextlib
import errno
import io
import os
import shutil
import socket
import stat
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.errors import TransientError, UserError
from pipeline.run_paths import list_checkpoints
from pipeline.training.ranks.watchdog import Watchdog
from pipeline.training.run_folder.checkpoint import CheckpointWriter, load_state, write_checkpoint
from pipeline.training.run_folder.folder import RunFolder
from pipeline.training.run_folder.local import LocalSnapshots, publish_newest
from pipeline.training.run_folder.manifest import DamagedCheckpoint, find_newest_good, verify_checkpoint
from pipeline.training.run_folder.same_recipe import check_fingerprints
from pipeline.training.run_folder.snapshot import HostCopy, Snapshot

META = {"semantic_config": {"optim.lr": 0.1, "model.name": "resnet18"}, "index_fingerprint": "abc", "blacklist": []}


def state(value: float) -> dict:
    return {"model": {"w": torch.full((50,), value)}, "optimizer": {"state": {0: {"m": torch.ones(3)}}, "lr": 0.1}}


def steps(folder):
    return [step for step, _ in list_checkpoints(folder)]


def test_what_was_written_is_read_back(tmp_path):
    path = write_checkpoint(tmp_path, 12345, state(2.5), META)
    assert path.name == "step-000012345"
    assert verify_checkpoint(path)["step"] == 12345
    loaded = load_state(path)
    assert torch.equal(loaded["model"]["w"], torch.full((50,), 2.5))
    plain = torch.load(path / "model.pt", weights_only=True)  # what any user can do with it
    assert torch.equal(plain["w"], loaded["model"]["w"])


@pytest.mark.parametrize("file", ["model.pt", "optimizer.pt", "meta.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "empty"])
def test_damage_is_found_named_and_the_one_before_is_used(tmp_path, file, how):
    write_checkpoint(tmp_path, 1, state(1), META)
    path = write_checkpoint(tmp_path, 2, state(2), META) / file
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        path.write_bytes({"flipped": flipped, "truncated": data[:middle], "empty": b""}[how])
    with pytest.raises(DamagedCheckpoint, match="step-000000002"):
        verify_checkpoint(path.parent)
    warnings = []
    found, meta = find_newest_good(tmp_path, warnings.append)
    assert (found.name, meta["step"]) == ("step-000000001", 1)
    assert len(warnings) == 1 and "step-000000002" in warnings[0] and file in warnings[0]


@pytest.mark.parametrize("file", ["model.pt", "meta.json"])
@pytest.mark.parametrize(
    ("number", "raised", "words"),
    [
        (errno.EACCES, UserError, "ask its owner for access"),
        (errno.ESTALE, TransientError, "try again"),
        (errno.EMFILE, TransientError, "try again"),
        (errno.EIO, None, "using the one before it"),
    ],
)
def test_only_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, file, number, raised, words):
    """Passed over, it would be set aside, and its steps trained again."""
    write_checkpoint(tmp_path, 1, state(1), META)
    write_checkpoint(tmp_path, 2, state(2), META)
    refuse(monkeypatch, f"step-000000002/{file}", number)
    warnings = []
    if raised is None:
        assert find_newest_good(tmp_path, warnings.append)[1]["step"] == 1
        assert words in warnings[0]
        shutil.rmtree(tmp_path / "step-000000001")
        raised, words = TransientError, "no other is left"
    with pytest.raises(raised, match=words):
        find_newest_good(tmp_path, warnings.append)


def refuse(monkeypatch, place, number):
    """The operating system refuses to open a file whose path ends so."""
    really = io.open

    def opens(path, *arguments, **options):
        if str(path).endswith(place):
            raise OSError(number, os.strerror(number), str(path))
        return really(path, *arguments, **options)

    monkeypatch.setattr(io, "open", opens)


def test_a_half_written_folder_is_no_checkpoint_and_is_cleared_away(tmp_path):
    write_checkpoint(tmp_path, 1, state(1), META)
    half = tmp_path / ".step-000000002.77.tmp"
    half.mkdir()
    (half / "model.pt").write_bytes(b"half")
    assert steps(tmp_path) == [1]
    CheckpointWriter(tmp_path, 2, set, print).close()
    assert not half.exists() and steps(tmp_path) == [1]


def test_newest_and_protected_are_kept(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2, protected=lambda: {3}, warn=print)
    for step in range(1, 8):
        writer.save(Snapshot(step, state(step), META))
    assert writer.close()
    assert steps(tmp_path) == [7, 6, 3]
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:09d}" for step in (3, 6, 7)]


def test_an_old_checkpoint_that_can_not_be_removed_is_no_failed_save(tmp_path, monkeypatch):
    """As one of another account in a folder with the sticky bit: the others go, and the run can finish."""
    rename, warnings = Path.rename, []

    def renames(path, target):
        if path.name == "step-000000002":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renames)
    writer = CheckpointWriter(tmp_path, keep=1, protected=set, warn=warnings.append)
    for step in range(1, 5):
        writer.save(Snapshot(step, state(step), META))
        assert writer.wait()
    assert steps(tmp_path) == [4, 2]
    assert len(warnings) == 2 and "step-000000002 (Operation not permitted)" in warnings[0]
    writer.close()


def test_a_file_system_that_syncs_no_folders_takes_checkpoints(tmp_path, monkeypatch):
    fsync = os.fsync

    def fsyncs(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsyncs)
    write_checkpoint(tmp_path, 1, state(1), META)
    assert find_newest_good(tmp_path, print)[1]["step"] == 1


def test_a_refusing_disk_leaves_the_older_one_and_training(tmp_path):
    """The write fails (the folder became a file); the warning names it, and a later save succeeds."""
    folder = tmp_path / "checkpoints"
    warnings = []
    writer = CheckpointWriter(folder, 2, set, warnings.append)
    folder.write_text("in the way")
    writer.save(Snapshot(1, state(1), META))
    assert not writer.wait()
    assert len(warnings) == 1 and str(folder) in warnings[0]
    folder.unlink()
    writer.save(Snapshot(2, state(2), META))
    assert writer.close() and steps(folder) == [2]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_full_disk_leaves_the_older_one_and_training(tmp_path):
    warnings = []
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        writer = CheckpointWriter(tmp_path / "checkpoints", 2, set, warnings.append)
        writer.save(Snapshot(1, state(1), META))
        writer.save(Snapshot(2, {"model": {"w": torch.zeros(1_000_000)}, "optimizer": {}}, META))
        assert not writer.wait()
        assert "No space left on device" in warnings[0] and "next save tries again" in warnings[0]
        writer.save(Snapshot(3, state(3), META))
        assert writer.close() and steps(tmp_path / "checkpoints") == [3, 1]
        assert not list((tmp_path / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a folder read-only")
def test_a_disk_that_turns_read_only_leaves_the_older_one_and_training(tmp_path):
    folder, warnings = tmp_path / "checkpoints", []
    writer = CheckpointWriter(folder, 2, set, warnings.append)
    writer.save(Snapshot(1, state(1), META))
    assert writer.wait()
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        writer.save(Snapshot(2, state(2), META))
        assert not writer.wait()
        assert "Read-only file system" in warnings[0] and "next save tries again" in warnings[0]
        assert steps(folder) == [1] and verify_checkpoint(folder / "step-000000001")
        subprocess.run(["mount", "-o", "remount,rw,bind", folder], check=True)
        writer.save(Snapshot(3, state(3), META))
        assert writer.close() and steps(folder) == [3, 1]
    finally:
        subprocess.run(["umount", folder], check=True)


BLKIO = Path("/sys/fs/cgroup/blkio")


@contextlib.contextmanager
def slow_disk(tmp_path):
    """A file system that takes 1 MB/s from this process. Skips where this machine can't make one."""
    if os.geteuid() != 0 or not (BLKIO / "blkio.throttle.io_serviced").exists() or shutil.which("mkfs.ext2") is None:
        pytest.skip("needs root, loop devices, mkfs.ext2 and cgroup v1's blkio")
    image, place, group = tmp_path / "disk.img", tmp_path / "disk", BLKIO / f"slow-{os.getpid()}"
    place.mkdir()
    subprocess.run(["truncate", "-s", "32M", image], check=True)
    subprocess.run(["mkfs.ext2", "-q", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, place], check=False).returncode:
        pytest.skip("no loop device to be had")
    try:
        device = place.stat().st_dev
        try:
            group.mkdir()
            (group / "blkio.throttle.write_bps_device").write_text(f"{os.major(device)}:{os.minor(device)} 1000000")
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError as error:
            pytest.skip(f"no limit can be set on a disk here ({error})")
        yield place
    finally:
        if group.exists():
            with contextlib.suppress(OSError):
                (BLKIO / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()
        subprocess.run(["umount", place], check=True)


def test_a_slow_disk_holds_up_only_the_next_save(tmp_path):
    large = {"model": {"w": torch.rand(500_000)}, "optimizer": {}}  # 2 MB: some two seconds
    with slow_disk(tmp_path) as disk:
        folder, warnings = disk / "checkpoints", []
        writer = CheckpointWriter(folder, 2, set, warnings.append)
        writer.save(Snapshot(1, large, META))
        assert list_checkpoints(folder) == []  # training continues meanwhile
        writer.save(Snapshot(2, large, META))
        assert steps(folder) == [1]  # the second waited for the first
        assert writer.close() and steps(folder) == [2, 1] and not warnings
        assert verify_checkpoint(folder / "step-000000002")


def test_a_folder_that_vanishes_is_made_again(tmp_path):
    folder, warnings = tmp_path / "run/checkpoints", []
    writer = CheckpointWriter(folder, 2, set, warnings.append)
    writer.save(Snapshot(1, state(1), META))
    assert writer.wait()
    shutil.rmtree(tmp_path / "run")
    writer.save(Snapshot(2, state(2), META))
    assert writer.close() and steps(folder) == [2] and not warnings


def test_another_recipe_or_data_set_is_an_error_that_names_the_values(tmp_path):
    meta = verify_checkpoint(write_checkpoint(tmp_path, 1, state(1), META))
    check_fingerprints(tmp_path, meta, META["semantic_config"], "abc")
    check_fingerprints(
        tmp_path, meta, {**META["semantic_config"], "optim.layer_decay": 1.0}, "abc"
    )  # a later one's default
    with pytest.raises(UserError, match=r"optim.layer_decay is 1.0 in the checkpoint, and 0.5 is asked for"):
        check_fingerprints(tmp_path, meta, {**META["semantic_config"], "optim.layer_decay": 0.5}, "abc")
    with pytest.raises(UserError, match=r"optim.lr is 0.1 in the checkpoint, and 0.2 is asked for"):
        check_fingerprints(tmp_path, meta, {**META["semantic_config"], "optim.lr": 0.2}, "abc")
    with pytest.raises(UserError, match=r"another data set.*abc.*xyz.*--model\.weights RUN_FOLDER"):
        check_fingerprints(tmp_path, meta, META["semantic_config"], "xyz")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_loading_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path, 1, {**state(1), "model": {"w": Malicious()}}, META)
    verify_checkpoint(path)  # its digests are right: the pickle itself is the danger
    with pytest.raises(TransientError, match=r"model\.pt"):
        load_state(path)
    assert not (tmp_path / "pwned").exists()


def test_snapshot_does_not_follow_the_training(tmp_path):
    live = state(1) | {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": [0.1, 0.2]}}
    live["model"]["conv"] = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    live["model"]["strided"] = torch.arange(12.0).view(3, 4)[:, ::2]
    conv = live["model"]["conv"].clone()
    host = HostCopy(torch.device("cpu"), print)
    copy, wait = host.take(live)
    wait()
    live["model"]["w"].add_(1)
    live["model"]["conv"].zero_()
    assert copy["model"]["strided"].tolist() == [[0, 2], [4, 6], [8, 10]]
    live["optimizer"]["lr"][0] = 7
    assert torch.equal(copy["model"]["w"], torch.ones(50)) and copy["optimizer"]["lr"] == [0.1, 0.2]
    assert torch.equal(copy["model"]["conv"], conv) and copy["model"]["conv"].stride() == conv.stride()
    again = write_checkpoint(tmp_path, 1, copy, META)
    assert torch.equal(load_state(again)["model"]["conv"], conv)


def test_a_second_snapshot_takes_no_new_memory():
    live, host = state(1), HostCopy(torch.device("cpu"), print)
    host.reserve(live)
    places = [t.data_ptr() for t in host.host]
    first, _ = host.take(live)
    live["model"]["w"].add_(1)
    second, _ = host.take(live)
    assert first["model"]["w"].data_ptr() == second["model"]["w"].data_ptr() == places[0]
    assert torch.equal(second["model"]["w"], live["model"]["w"])
    assert host.bytes == sum(t.nbytes for t in host.host) > 0


def test_a_snapshot_waits_for_the_one_being_written(tmp_path):
    """The writer asks for the device's copy, and for the ledger, before it writes; a second save waits for it."""
    told, go = [], threading.Event()
    writer = CheckpointWriter(tmp_path, 2, set, print, before=lambda: told.append("ledger"))
    writer.save(Snapshot(1, state(1), META, lambda: (go.wait(20), told.append("copied"))[1]))
    assert steps(tmp_path) == []
    go.set()
    writer.save(Snapshot(2, state(2), META))
    assert told[:2] == ["ledger", "copied"] and 1 in steps(tmp_path)
    assert writer.close() and steps(tmp_path) == [2, 1]


def test_a_checkpoint_moved_elsewhere_still_verifies(tmp_path):
    path = write_checkpoint(tmp_path / "a", 1, state(1), META)
    moved = shutil.move(path, tmp_path / "b")
    assert verify_checkpoint(tmp_path / "b")["step"] == 1 and moved


def test_no_room_for_snapshots_in_memory_is_said_once_by_each_node(tmp_path, caplog):
    """Also by those that rank 0 is not on, where nothing was said, and each further one was tried."""
    (tmp_path / "memory").write_text("in the way")
    local = LocalSnapshots(tmp_path / "memory/snapshots", torch.device("cpu"), pytest.fail)
    for step in (1, 2):
        local.save(step, state(step), META)
        assert local._writing is not None
        local._writing.result(30)
    local.close()
    (said,) = (record.getMessage() for record in caplog.records)
    assert "no room for snapshots" in said and socket.gethostname() in said and not local.is_due()


def test_a_snapshot_that_can_not_be_published_is_said_by_its_node(tmp_path, caplog, monkeypatch):
    """The node that has it need not be rank 0's, and all others are quiet: the steps were lost without a word."""
    write_checkpoint(tmp_path / "memory", 5, state(5), META)
    local = LocalSnapshots(tmp_path / "memory", torch.device("cpu"), pytest.fail)
    monkeypatch.setattr("pipeline.training.run_folder.local.current_launch", lambda: SimpleNamespace(round=2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    ranks = {"size": 2, "rank": 1, "local_rank": 0, "watch": Watchdog()}
    world = SimpleNamespace(**ranks, on_rank_zero=lambda _: True, any=lambda flag: flag)
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.checkpoints.write_text("in the way")
    publish_newest(world, local, run)
    local.close()
    (said,) = (record.getMessage() for record in caplog.records)
    assert "the snapshot of step 5" in said and "Not a directory" in said
