"""Disks and accounts as they are: folders of another user, read-only roots, links to other disks, full file systems.

What root may do anyway is tried as another user, in a process of its own.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch
from test_index import make_folder
from test_layouts import official_tars

from pipeline.__main__ import main
from pipeline.api import load_config
from pipeline.dataset import disk, lock, valprep
from pipeline.dataset.index import scan, scan_journal
from pipeline.dataset.index.index import Split
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards import marker, pack
from pipeline.dataset.shards.format import ShardWriter
from pipeline.errors import UserError
from pipeline.files import why_full
from pipeline.insight.preflight.node_facts import probe_folder
from pipeline.training.run_folder.checkpoint import write_checkpoint
from pipeline.training.run_folder.folder import make_run_folder

NOBODY = 65534
# Without the right of root to enter and write everywhere; the account stays, and so does access to the interpreter.
WITHOUT_RIGHTS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
needs_setpriv = pytest.mark.skipif(
    os.getuid() == 0 and shutil.which("setpriv") is None, reason="needs setpriv, or not to be root"
)


def as_another(*argv: object) -> subprocess.CompletedProcess:
    """`pipeline ARGV` by an account that may not enter what it does not own."""
    command = [sys.executable, "-m", "pipeline", *map(str, argv)]
    if os.getuid() == 0:
        command = [*WITHOUT_RIGHTS, *command]
    return subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def pets(tmp_path):
    names = ["1.png", "2.png", "3.png", "4.png"]
    root = make_folder(tmp_path / "pets", {f"{split}/{kind}": names for split in ("train", "val") for kind in "ab"})
    build_index(root)
    yield root
    for path in (tmp_path, *tmp_path.rglob("*")):  # else it can't be removed
        if path.is_dir():
            path.chmod(0o755)


def close(path: Path) -> None:
    """Make a folder one that belongs to another user."""
    if os.getuid() == 0:
        os.chown(path, NOBODY, NOBODY)
        path.chmod(0o700)
    else:
        path.chmod(0)


@needs_setpriv
@pytest.mark.parametrize("closed", ["pets", "pets/index", "pets/train", "pets/val/a"])
def test_a_folder_of_another_user_is_one_line(pets, tmp_path, closed):
    (pets / "train" / "new").mkdir()  # the index is out of date, so that all verbs look at the tree
    shutil.copy(pets / "train/a/1.png", pets / "train/new/1.png")
    close(tmp_path / closed)
    verbs = [["index", pets], ["verify", pets], ["pack", pets, tmp_path / "out"]]
    if closed == "pets":
        verbs += [
            ["valprep", pets],
            ["train", "--config", runs.TINY, "--data.root", pets, "--run_dir", tmp_path / "run"],
            ["preflight", "--config", runs.TINY, "--data.root", pets, "--run_dir", tmp_path / "run"],
            ["evaluate", pets / "run"],
            ["report", pets / "run"],
            ["status", pets / "run"],
            ["estimate", "--config", pets / "recipe.yaml"],
            ["bench", "io", pets],
            ["stage", pets, tmp_path / "staged"],
            ["export", pets / "run", tmp_path / "out.pt"],
        ]
    for verb in verbs:
        done = as_another(*verb)
        assert "Traceback" not in done.stderr, (verb, done.stderr[-500:])
        assert done.returncode == 2, (verb, done.stdout[-500:], done.stderr[-500:])
        assert "ermission denied" in done.stdout + done.stderr, (verb, done.stderr)


@needs_setpriv
def test_a_folder_of_another_user_beside_the_data_set_is_passed_over(pets, tmp_path):
    (tmp_path / "private").mkdir()
    close(tmp_path / "private")
    found = as_another("index", tmp_path)
    assert found.returncode == 0 and f"taking {pets}" in found.stderr
    shutil.rmtree(pets)
    alone = as_another("index", tmp_path)
    assert alone.returncode == 2 and f"{tmp_path / 'private'}: Permission denied" in alone.stderr


@needs_setpriv
@pytest.mark.parametrize("name", ["ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz"])
def test_a_file_of_another_user_is_not_called_damaged(tmp_path, name):
    root = official_tars(tmp_path / "set")
    close(root / name)
    for verb in (["index", root], ["fetch", tmp_path / "dest", "--from", root], ["pack", root, tmp_path / "out"]):
        done = as_another(*verb)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"{root / name}" in done.stderr and "Permission denied" in done.stderr, (verb, done.stderr)
        assert "again" not in done.stderr and "can't write" not in done.stderr, (verb, done.stderr)


@needs_setpriv
def test_an_image_without_permission_is_counted(pets):
    shutil.rmtree(pets / "index")
    image = pets / "train/a/1.png"
    image.chmod(0)
    if os.getuid() == 0:
        os.chown(image, NOBODY, NOBODY)
    done = as_another("index", pets)
    assert done.returncode == 0 and "left out of train: 1 without permission (train/a/1.png)" in done.stdout


@needs_setpriv
def test_a_root_that_can_only_be_read(pets, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(pets / "index", elsewhere)
    shutil.rmtree(elsewhere)
    assert main(["index", str(pets), "--out", str(elsewhere)]) == 0
    for path in (*pets.rglob("*"), pets):
        if path.is_dir():
            path.chmod(0o555)
    config = ["--config", runs.TINY, "--data.root", pets, "--run_dir", tmp_path / "run"]
    seen = as_another("preflight", *config)
    assert seen.returncode == 2 and "FAIL  data" in seen.stdout and "--data.index DIR" in seen.stdout
    assert as_another("preflight", *config, "--data.index", elsewhere).returncode == 0
    refused = as_another("pack", pets, tmp_path / "shards")
    assert refused.returncode == 2 and "--index DIR (pack" in refused.stderr
    assert as_another("pack", pets, tmp_path / "shards", "--index", elsewhere).returncode == 0
    assert "unchanged and readable" in as_another("verify", pets, "--index", elsewhere).stdout
    bench = ["bench", "io", pets, "--batches", 1, "--batch_size", 2, "--threads", 1, "--json", tmp_path / "io.json"]
    assert as_another(*bench, "--index", elsewhere).returncode == 0


@needs_setpriv
def test_a_run_on_a_root_that_can_only_be_read_now(pets, tmp_path):
    """evaluate, report and bench loader take the index from elsewhere; nothing is written into the root."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    runs.call(pets, run, "--train.global_batch_size", "4", "--schedule.epochs", "1")
    shutil.rmtree(pets / "index")
    build_index(pets, elsewhere)
    for path in (*pets.rglob("*"), pets):
        if path.is_dir():
            path.chmod(0o555)
    refused = as_another("evaluate", run)
    assert refused.returncode == 2 and "--index DIR" in refused.stderr
    done = as_another("evaluate", run, "--index", elsewhere)
    assert done.returncode == 0 and re.search(r"images +8\n", done.stdout), done.stderr
    assert main(["report", str(run), "--index", str(elsewhere), "--device", "cpu"]) == 0
    page = (run / "report/index.html").read_text()
    assert "no index" not in page and "Predictions" in page
    bench = ["bench", "loader", str(pets), "--size", "32", "--batch_size", "2", "--images", "4", "--rounds", "1"]
    assert main(bench) == 2
    assert main([*bench, "--threads", "1", "--index", str(elsewhere), "--json", str(tmp_path / "b.json")]) == 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code, capsys):
    def refuse(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.locked(tmp_path / "lock", "busy", wait=False), (tmp_path / "lock").open() as file:
        assert lock.try_lock(file)
    assert capsys.readouterr().err == f"{tmp_path}: its file system has no locks; run only one command at a time here\n"


@pytest.mark.parametrize("linked", ["train", "val", "train/n99000000"])
def test_fetch_writes_through_links_to_another_disk(synthetic_root, kaggle_zip, tmp_path, monkeypatch, linked):
    """The folder behind the link is on a disk of its own: renaming into it fails as between two disks."""
    data, big = tmp_path / "data", tmp_path / "big"
    big.mkdir()
    link = data / "ILSVRC/Data/CLS-LOC" / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(big)
    real = os.replace

    def on_this_disk(path) -> bool:
        return not os.path.realpath(path).startswith(str(big))

    def replace(source, target):
        if on_this_disk(source) != on_this_disk(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "replace", lambda self, target: replace(self, target))
    assert main(["fetch", str(data), "--from", str(kaggle_zip)]) == 0
    assert build_index(data).fingerprint == build_index(synthetic_root, tmp_path / "index").fingerprint
    assert not list(tmp_path.rglob("*.part"))


def test_full_disks_say_what_is_full(tmp_path, monkeypatch):
    def stat(bytes_free, inodes_free):
        fields = {"f_files": 100, "f_favail": inodes_free, "f_bavail": bytes_free, "f_frsize": 4096}
        return lambda _: type("Stat", (), fields)()

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "statvfs", stat(1 << 20, 0))
    assert "no inode left for another file, though 4.3 GB are free (see: df -i" in why_full(full, tmp_path / "a/b")
    assert "no inode left" in str(disk.explain(full, tmp_path / "a"))
    monkeypatch.setattr(os, "statvfs", stat(0, 50))
    assert why_full(full, tmp_path) == "disk full"
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "quota exceeded (see: quota -s" in str(disk.explain(quota, tmp_path / "a"))


@pytest.mark.parametrize("what", ["a shard", "the journal", "the index's list", "the shards' list"])
def test_a_disk_that_fills_up_is_one_line(pets, tmp_path, monkeypatch, capsys, what):
    """What is left in buffers is flushed once more when the file is closed, and finds no space again."""

    def refuse(path, *_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    def full(*_):
        return Path("/dev/full").open("ab", buffering=1 << 20)

    if what in ("the journal", "the index's list"):
        shutil.rmtree(pets / "index")
    if what == "a shard":
        monkeypatch.setattr(ShardWriter, "_open", full)
    elif what == "the journal":
        begin = scan_journal.ScanJournal.__init__

        def begin_full(journal, path):
            begin(journal, path)
            journal.file = full()

        monkeypatch.setattr(scan_journal.ScanJournal, "__init__", begin_full)
    else:
        monkeypatch.setattr(scan if what == "the index's list" else pack, "atomic_write", refuse)
    assert main(["pack", str(pets), str(tmp_path / "out"), "--processes", "1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pipeline pack: ") and (
        "No space left" in error or "disk full" in error or "quota" in error
    )


@pytest.mark.parametrize("what", ["the index", "an image", "a shard", "the folder", "a list"])
def test_a_server_that_is_away_for_a_moment_is_not_the_users_mistake(pets, tmp_path, monkeypatch, capsys, what):
    """Exit code 1, try again: nothing is to be built again, looked at or removed."""
    build_index(pets)
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(tmp_path / what))

    def fail(*_, **__):
        raise stale

    read = Path.read_bytes
    argv = ["pack", str(pets), str(tmp_path / "out"), "--processes", "1"]
    if what == "the index":
        monkeypatch.setattr(Path, "read_bytes", lambda path: fail() if path.name == "index.json" else read(path))
        argv = ["stage", *argv[1:3]]
    elif what == "an image":
        monkeypatch.setattr(Split, "read", fail)
    elif what == "a shard":
        monkeypatch.setattr(ShardWriter, "_member", fail)
    elif what == "the folder":
        monkeypatch.setattr(marker, "atomic_write", fail)
    else:
        monkeypatch.setattr(valprep, "sort_val", fail)
        argv = ["valprep", str(pets)]
    assert main(argv) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"pipeline {argv[0]}: ") and "Stale file handle" in error
    assert not re.search("verify|built? |another folder|remove", error)


@needs_setpriv
@pytest.mark.parametrize("what", ["pack.json", "train-000000.tar", "archive.zip", ""])
def test_what_may_not_be_read_is_not_called_unwritable(pets, tmp_path, what):
    """pack.json: nobody is told to remove the shards."""
    assert main(["pack", str(pets), str(tmp_path / "set"), "--processes", "1"]) == 0
    (tmp_path / "set/archive.zip").write_bytes(b"PK")
    (tmp_path / "set" / what).chmod(0)
    argv = {
        "pack.json": ["pack", str(pets), str(tmp_path / "set")],
        "": ["pack", str(pets), str(tmp_path / "set")],
        "train-000000.tar": ["stage", str(tmp_path / "set"), str(tmp_path / "local")],
        "archive.zip": ["fetch", str(tmp_path / "new"), "--from", str(tmp_path / "set/archive.zip")],
    }[what]
    done = as_another(*argv)
    assert done.returncode == 2
    assert f"{tmp_path / 'set' / what}: Permission denied for this account; ask its owner" in done.stderr


mounts = pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="mounts a file system")


def with_mounts(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script whose mounts nobody else sees; it exits with 77 where it may not mount."""
    command = ["unshare", "-m", "sh", "-c", script, *arguments]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("may not mount here")
    return done


@mounts
def test_a_real_file_system_without_inodes(tmp_path):
    """fetch, index and pack on a tmpfs of 30 inodes: one line that names the inodes."""
    root = tmp_path / "set"
    make_folder(root, {f"{split}/a": [f"{i}.png" for i in range(3)] for split in ("train", "val")})
    script = f"""
mount -t tmpfs -o nr_inodes=4,size=64m tmpfs {tmp_path}/small || exit 77
touch {tmp_path}/small/1 {tmp_path}/small/2 {tmp_path}/small/3
{sys.executable} -m pipeline index {root} --out {tmp_path}/small
"""
    (tmp_path / "small").mkdir()
    done = with_mounts(script)
    assert done.returncode == 2 and "no inode left" in done.stderr, done.stderr


OVERLAID = """
import sys
from pathlib import Path
from pipeline.run_paths import RunPaths
from pipeline.training.run_folder.checkpoint import CheckpointWriter
from pipeline.training.run_folder.set_aside import set_aside

folder = RunPaths(Path(sys.argv[1]))
set_aside(folder, 3, [], print)
CheckpointWriter(folder.checkpoints, keep=1, protected=set, warn=print).remove_after(2)
print([str(path.relative_to(folder.path)) for path in sorted(folder.path.rglob("meta.json"))])
"""


@mounts
def test_checkpoints_of_a_container_image_are_moved_and_removed(tmp_path):
    """An overlay can't rename a folder that is in a layer below it."""
    for name in ("image", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    for step in (2, 3, 4):
        write_checkpoint(tmp_path / "image/run/checkpoints", step, {"model": {"x": torch.ones(2)}}, {})
    script = f"""
cd {tmp_path} && mount -t overlay -o lowerdir=image,upperdir=upper,workdir=work overlay merged || exit 77
{sys.executable} -c "$0" merged/run
"""
    done = with_mounts(script, OVERLAID)
    left = ["checkpoints/step-000000002", "set-aside-after-step-000000003/checkpoints/step-000000004"]
    assert done.stdout.splitlines()[-1:] == [str([f"{path}/meta.json" for path in left])], done.stderr


@pytest.mark.parametrize(
    ("refuses", "number", "reason"),
    [
        ("open", errno.EPERM, "is on a file system that can't append to a file (Operation not permitted)"),
        ("rename", errno.EMFILE, "is on a file system that can't rename a folder (Too many open files)"),
        ("mkdir", errno.EROFS, "can't be written (Read-only file system)"),
    ],
)
def test_a_run_folder_whose_file_system_can_not_hold_a_run(tmp_path, monkeypatch, refuses, number, reason):
    """As storage in the cloud that is mounted by rclone, or by gcsfuse. Both `train` and `preflight` say so."""
    does = getattr(Path, refuses)

    def refuse(path, *arguments, **options):
        if ".writable" in str(path) and (refuses != "open" or "ab" in arguments):
            raise OSError(number, os.strerror(number), str(path))
        return does(path, *arguments, **options)

    monkeypatch.setattr(Path, refuses, refuse)
    config = load_config("smoke", {"run_dir": str(tmp_path), "data.root": str(tmp_path)})
    with pytest.raises(UserError, match=re.escape(f"run folder {tmp_path} {reason}")):
        make_run_folder(config)
    assert (probe_folder(tmp_path / "new") or "").startswith(f"{tmp_path} {reason}")
    monkeypatch.undo()
    assert make_run_folder(config).path == tmp_path and probe_folder(tmp_path / "new") is None
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_valprep_leaves_nothing_that_index_refuses(synthetic_root, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(synthetic_root, root)
    before = build_index(root).fingerprint
    val = root / "ILSVRC/Data/CLS-LOC/val"
    inner = val / "ILSVRC2012_img_val/val"
    inner.mkdir(parents=True)
    for path in val.glob("*.JPEG"):
        path.rename(inner / path.name)
    (val / ".ipynb_checkpoints").mkdir()
    shutil.copy(next(inner.glob("*.JPEG")), val / ".ipynb_checkpoints")
    assert main(["valprep", str(root)]) == 0
    assert not (val / "ILSVRC2012_img_val").exists()
    assert len(list((val / ".ipynb_checkpoints").iterdir())) == 1
    assert build_index(root).fingerprint == before
