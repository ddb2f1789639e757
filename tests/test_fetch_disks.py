"""`fetch` on disks that are nearly full, out of inodes or failing, and where an earlier fetch left its images."""

import errno
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from fetching import BASE, QUICK, assert_whole, read_images, sorted_images

from pipeline.__main__ import main
from pipeline.dataset import valprep
from pipeline.dataset.acquire import fetch as fetch_verb
from pipeline.dataset.acquire import kaggle, tree
from pipeline.dataset.acquire.access.remote import Address, LocalFile
from pipeline.dataset.acquire.manifest import MANIFEST, read_manifest
from pipeline.errors import TransientError, UserError

TINY = Path(__file__).with_name("tiny.yaml")
FAILING = Path("/proc/self/mem")  # reading its first bytes is an input/output error


@pytest.fixture
def downloads(kaggle_zip, monkeypatch) -> list[Path]:
    """A client of Kaggle that copies `kaggle_zip`, unless the folder has it; the copies that it has made."""
    made: list[Path] = []

    class Client:
        def __init__(self, *_):
            pass

        def sign(self) -> Address:
            return Address("http://storage.test/a", kaggle_zip.stat().st_size, "")

        def download(self, folder: Path, _size) -> Path:
            if not (folder / kaggle_zip.name).exists():
                made.append(Path(shutil.copy(kaggle_zip, folder)))
            return folder / kaggle_zip.name

    monkeypatch.setattr(kaggle, "Kaggle", Client)
    return made


def have_free(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free})())


def stop_before_the_end(monkeypatch, argv: list[str]) -> None:
    """Run a fetch that is stopped with all its images there."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch_verb, "_finish", interrupt)
        assert main(argv) == 75


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_does_not_cost_the_download(downloads, kaggle_members, tmp_path, monkeypatch, capsys, code):
    real, left = os.replace, [20]

    def replace(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(code, os.strerror(code))
        real(source, target)

    command = ["fetch", str(tmp_path / "data"), "--via", "zip", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(tree.os, "replace", replace)
        assert main(command) == 1
    assert os.strerror(code) in capsys.readouterr().err
    assert downloads[0].exists()
    assert main(command) == 0
    assert len(downloads) == 1 and not downloads[0].exists(), "it is removed once all is unpacked"
    assert_whole(tmp_path / "data", kaggle_members)


def test_a_damaged_download_is_removed(downloads, kaggle_zip, kaggle_members, tmp_path, monkeypatch, capsys):
    def damage(self, folder: Path, size) -> Path:
        file = download(self, folder, size)
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 3)
            opened.write(b"damaged")
        return file

    download = kaggle.Kaggle.download
    command = ["fetch", str(tmp_path / "data"), "--via", "zip", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(kaggle.Kaggle, "download", damage)
        assert main(command) == 1
    assert "the download was removed" in capsys.readouterr().err
    assert not downloads[0].exists()
    assert main(command) == 0 and len(downloads) == 2
    assert_whole(tmp_path / "data", kaggle_members)


@pytest.mark.parametrize("form", ["tar.gz", "zip in a zip", "own download"])
def test_what_is_unpacked_already_needs_no_space(
    downloads, nested_kaggle_zip, kaggle_members, tmp_path, monkeypatch, capsys, form
):
    """A fetch that was stopped near its end finds a disk that is nearly full, and goes on."""
    source = ["--from", str(nested_kaggle_zip)]
    if form == "tar.gz":
        with zipfile.ZipFile(nested_kaggle_zip) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".tar.gz"))
            source = ["--from", archive.extract(name, tmp_path)]
    if form == "own download":
        source = ["--via", "zip"]
    command = ["fetch", str(tmp_path / "data"), *source, *QUICK]
    with monkeypatch.context() as patch:
        have_free(patch, 200_000)
        assert main(command) == 2, "with nothing there it needs more"
        assert "GB are needed" in capsys.readouterr().err
    stop_before_the_end(monkeypatch, command)
    if form == "own download":
        (tmp_path / "data/.fetch/download").mkdir()
        kaggle.Kaggle().download(tmp_path / "data/.fetch/download", None)
    for path in sorted((tmp_path / "data" / BASE).rglob("*.JPEG"))[:20]:
        path.unlink()
    have_free(monkeypatch, 200_000)
    assert main(command) == 0
    assert read_images(tmp_path / "data") == sorted_images(kaggle_members)


@pytest.mark.parametrize("part", [("--classes", "1"), ("--split", "val")])
def test_a_part_of_a_tar_needs_no_space_for_all(nested_kaggle_zip, tmp_path, monkeypatch, part):
    have_free(monkeypatch, 200_000)
    assert main(["fetch", str(tmp_path / "data"), "--from", str(nested_kaggle_zip), *QUICK, *part]) == 0


def test_shards_need_few_inodes(kaggle_zip, tmp_path, monkeypatch, capsys):
    sizes = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail"), 1 << 20)
    fields = {"f_files": 200, "f_favail": 50, "f_frsize": 4096} | sizes
    monkeypatch.setattr(os, "statvfs", lambda _: type("Stat", (), fields)())
    assert main(["fetch", str(tmp_path / "tree"), "--from", str(kaggle_zip), *QUICK]) == 2
    assert "has room for 50 more files" in capsys.readouterr().err
    assert main(["fetch", str(tmp_path / "shards"), "--from", str(kaggle_zip), "--pack"]) == 0


def test_a_mount_that_counts_no_files_is_tried(kaggle_zip, tmp_path, monkeypatch):
    """rclone's mounts say that no file is free, and take them."""
    sizes = dict.fromkeys(("f_blocks", "f_bfree", "f_bavail"), 1 << 20)
    fields = {"f_files": 10**9, "f_favail": 0, "f_frsize": 4096} | sizes
    monkeypatch.setattr(os, "statvfs", lambda _: type("Stat", (), fields)())
    assert main(["fetch", str(tmp_path / "tree"), "--from", str(kaggle_zip), *QUICK]) == 0


@pytest.mark.parametrize("split", ["all", "val"])
def test_a_part_is_not_called_complete_beside_classes_that_are_not(
    kaggle_zip, kaggle_members, tmp_path, monkeypatch, capsys, split
):
    """A fetch of all was stopped; then one class is asked for: the index would have them all."""
    dest = tmp_path / "data"
    command = ["fetch", str(dest), "--from", str(kaggle_zip), *QUICK, "--split", split]
    stop_before_the_end(monkeypatch, command)
    assert main([*command, "--classes", "1"]) == 2
    folder = dest / BASE / ("train" if split == "all" else "val")
    said = capsys.readouterr().err
    assert f"{folder} holds images of 3 other classes (n99000001, n99000002, n99000003), of a fetch that" in said
    assert main(command) == 0
    assert main([*command, "--classes", "1"]) == 0, "whole classes are no leftovers"
    if split == "all":
        assert_whole(dest, kaggle_members)


@pytest.mark.parametrize("verb", ["index", "pack", "train"])
def test_what_a_stopped_fetch_has_left_is_not_taken_for_the_data_set(kaggle_zip, tmp_path, monkeypatch, capsys, verb):
    """A job that was to train after an overnight fetch trained on the part that had come."""
    dest, out = tmp_path / "data", tmp_path / "out"
    command = ["fetch", str(dest), "--from", str(kaggle_zip), *QUICK]
    argv = {
        "index": ["index", str(dest)],
        "pack": ["pack", str(dest), str(out)],
        "train": ["train", "--config", str(TINY), "--data.root", str(dest), "--run_dir", str(out)],
    }[verb]
    stop_before_the_end(monkeypatch, command)
    valprep.sort_val(dest)
    assert main(argv) == 2
    assert f"the fetch into {dest} is not finished: run the same pipeline fetch again" in capsys.readouterr().err
    assert not list(out.glob("*.tar"))
    if verb != "train":
        assert main(command) == 0
        assert main(argv) == 0


def test_an_archive_that_cannot_be_read_is_not_called_unwritable(tmp_path):
    writer = tree.TreeWriter(tmp_path)
    stream = LocalFile(FAILING).open(0, 8)
    with pytest.raises(TransientError, match=f"can't read {FAILING} "):
        writer.write(0, 0, "LOC_val_solution.csv", map(stream.read, [8]))
    assert not (tmp_path / "LOC_val_solution.csv").exists()


def test_a_record_of_the_fetch_that_cannot_be_read_is_not_to_be_removed(tmp_path):
    (tmp_path / MANIFEST).symlink_to(FAILING)
    with pytest.raises(TransientError, match=r"can't read .*run the same command again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("code", "kind"), [(errno.ESTALE, TransientError), (errno.EDQUOT, UserError)])
def test_a_disk_that_fails_while_images_are_sorted(kaggle_zip, tmp_path, monkeypatch, code, kind):
    command = ["fetch", str(tmp_path), "--from", str(kaggle_zip), *QUICK, "--split", "val"]
    stop_before_the_end(monkeypatch, command)

    def fail(path: Path, _target) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(valprep, "_move", fail)
    with pytest.raises(kind):
        valprep.sort_val(tmp_path)
    assert len(read_images(tmp_path)) == 24
