"""The file system of a whole run folder fails in mid-run: training continues while it may, and no row is lost."""

import contextlib
import errno
import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import runs
import wandb
from wandb_server import KEY, WandbServer

from pipeline.errors import TransientError
from pipeline.run_paths import list_checkpoints
from pipeline.tracking import ledger as ledgers
from pipeline.tracking.ledger import Ledger
from pipeline.training.cli import mark_failed
from pipeline.training.recorder import RunRecorder
from pipeline.training.run_folder.manifest import verify_checkpoint

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
SMALL = ["--model.name", "shufflenet_v2_x0_5", "--model.zero_init_residual", "false"]
OPTIONS = [*SMALL, "--train.max_steps", "12", "--checkpoint.every_steps", "4"]
_EXT4_IOC_SHUTDOWN, _WITHOUT_THE_LOG = 0x8004587D, 2  # <linux/fs/ext4/ext4.h>


@pytest.fixture
def at_step(monkeypatch):
    """step -> what is done to the machine when rank 0 has recorded that step."""
    happenings, record = {}, RunRecorder.record_step

    def record_step(self, stats, *rest):
        record(self, stats, *rest)
        happenings.pop(stats.step, lambda: None)()

    monkeypatch.setattr(RunRecorder, "record_step", record_step)
    monkeypatch.setattr(ledgers, "LOOK_EVERY_S", 0.0)
    return happenings


def mount(*arguments) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def steps(run: Path) -> list[int]:
    return [row["step"] for row in runs.rows(run, "train")]


@AS_ROOT
def test_rows_that_a_full_disk_refuses_are_written_when_there_is_room(tmp_path):
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path)
    try:
        ledger, balloon = Ledger(tmp_path / "metrics.jsonl", 0), tmp_path / "balloon"
        for step in range(1, 900):  # some 100 bytes each
            if step == 100:
                with contextlib.suppress(OSError), balloon.open("wb") as file:
                    file.write(bytes(1 << 20))
            if step == 300:
                assert ledger.refusal is not None and len(steps(tmp_path)) < 200
                with pytest.raises(OSError, match="No space left"):
                    ledger.sync()  # so no checkpoint is written ahead of its rows
                balloon.unlink()
            ledger.append({"kind": "train", "step": step})
        assert ledger.refusal is None
        ledger.close()
        assert steps(tmp_path) == list(range(1, 900))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@AS_ROOT
def test_a_run_folder_that_is_unmounted_for_a_while(root, tmp_path, at_step):
    """Training goes on; nothing is written to the empty folder that is in its place; then all is there."""
    disk, place = tmp_path / "disk", tmp_path / "place"
    disk.mkdir()
    place.mkdir()
    mount("-t", "tmpfs", "tmpfs", disk)
    mount("--bind", disk, place)
    strangers = []

    def back() -> None:
        strangers.extend(place.rglob("*"))
        mount("--bind", disk, place)

    at_step |= {5: lambda: subprocess.run(["umount", "-l", place], check=True), 9: back}
    try:
        printed = runs.call(root, place / "run", *OPTIONS)
        assert f"run folder {place}/run can't be written" in printed and "outage_timeout_minutes" in printed
        assert "can be written again" in printed and strangers == []
        assert steps(place / "run") == list(range(1, 13))
        assert [step for step, _ in list_checkpoints(place / "run/checkpoints")] == [12, 11]  # saved on its return
        assert (place / "run/finished").exists()
    finally:
        subprocess.run(["umount", "-l", place, disk], check=True)


@AS_ROOT
def test_a_failed_save_is_told_to_wandb_and_the_next_one_is_tried(root, tmp_path, at_step, monkeypatch):
    server, folder = WandbServer(), tmp_path / "run/checkpoints"
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.teardown()  # its process keeps the address of the server before

    def lock_up() -> None:
        mount("--bind", folder, folder)
        mount("-o", "remount,ro,bind", folder)

    at_step |= {3: lock_up, 6: lambda: subprocess.run(["umount", "-l", folder], check=True)}
    try:
        printed = runs.call(root, tmp_path / "run", *OPTIONS, "--tracking.wandb", "online")
        assert "the checkpoint could not be written" in printed and steps(tmp_path / "run") == list(range(1, 13))
        assert [step for step, _ in list_checkpoints(folder)] == [12, 8]
        alerts = [text for text in server.asked if "notifyScriptableRunAlert" in text]
        assert len(alerts) == 1 and "Read-only file system" in alerts[0] and str(folder) in alerts[0]
        assert server.steps() == list(range(1, 13))
    finally:
        wandb.teardown()
        server.stop()


def test_a_run_folder_that_is_removed_is_made_again(root, tmp_path, at_step):
    run = tmp_path / "run"
    at_step[6] = lambda: shutil.rmtree(run)
    printed = runs.call(root, run, *OPTIONS)
    assert "it was deleted" in printed and "no row is lost" in printed
    assert steps(run) == list(range(1, 13)) and verify_checkpoint(runs.checkpoint_at(run, 8))
    assert "already finished" in runs.call(root, run, *OPTIONS)


@pytest.fixture
def ext4(tmp_path):
    """A file system of its own that turns read-only at an error, as a server's does: (folder, mount again)."""
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    subprocess.run(["truncate", "-s", "32M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)

    def again() -> None:
        subprocess.run(["umount", place], check=False, capture_output=True)
        if subprocess.run(["mount", "-o", "loop,errors=remount-ro", image, place], check=False).returncode:
            pytest.skip("no loop device to be had")

    again()
    yield place, again
    subprocess.run(["umount", place], check=True)


def turn_read_only(disk: Path) -> None:
    device = subprocess.run(["findmnt", "-no", "SOURCE", disk], check=True, capture_output=True, text=True).stdout
    Path(f"/sys/fs/ext4/{Path(device.strip()).name}/trigger_fs_error").write_text("1")


def shut_down(disk: Path) -> None:
    """From now on it answers everything with an input/output error."""
    descriptor = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _WITHOUT_THE_LOG))
    os.close(descriptor)


@pytest.mark.parametrize(("fault", "reason"), [(turn_read_only, "Read-only"), (shut_down, "Input/output error")])
def test_a_disk_that_fails_for_good_ends_the_run_and_the_next_start_goes_on(root, ext4, at_step, fault, reason):
    disk, again = ext4
    run, options = disk / "run", [*OPTIONS, "--train.max_steps", "14"]
    at_step[10] = lambda: fault(disk)
    printed = runs.call(root, run, *options, "--checkpoint.outage_timeout_minutes", "0.0001", expect=1)
    lines = [line for line in printed.splitlines() if line.startswith("pipeline train: ")]
    assert len(lines) == 1 and f"run folder {run} can't be written ({reason}" in lines[0], printed
    assert "run the same command to resume" in lines[0] and "Traceback" not in printed
    again()
    (run / "lock").unlink()  # else its owner, this process, would count as alive
    printed = runs.call(root, run, *options)
    assert "resuming from" in printed
    assert steps(run) == list(range(1, 15))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOTCONN, errno.EACCES])
def test_a_run_folder_that_does_not_answer_hides_no_error(tmp_path, code, monkeypatch, caplog):
    """That a marker can't be looked for took the place of the error that ended the run."""

    def exists(path):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "exists", exists)
    mark_failed(str(tmp_path), TransientError("the run folder can't be written for 10 min now"))
    assert f"could not mark {tmp_path} as failed" in caplog.text
