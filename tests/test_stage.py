"""Copying shards to a node's own disk: whole, once, and reused."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from pipeline.__main__ import main
from pipeline.dataset.index.index import RECORD, open_index
from pipeline.dataset.index.write import write_index
from pipeline.dataset.shards import stage
from pipeline.dataset.shards.stage import locked_folder, stage_shards
from pipeline.errors import TransientError, UserError


@pytest.fixture
def packed(tmp_path) -> Path:
    """A packed data set: 2 train shards and 1 val shard of 3 samples of 1000 bytes each."""
    root = tmp_path / "packed"
    splits, shards = {}, {"train": ["train-0.tar", "train-1.tar"], "val": ["sub/val-0.tar"]}
    random = np.random.default_rng(0)
    for split, names in shards.items():
        records = np.zeros(3 * len(names), RECORD)
        for number, name in enumerate(names):
            content = random.bytes(3000)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
            for i in range(3):
                record = records[3 * number + i]
                record["shard"], record["offset"], record["size"], record["label"] = number, 1000 * i, 1000, i % 2
                record["digest"] = xxhash.xxh3_64_intdigest(content[1000 * i : 1000 * (i + 1)])
        splits[split] = records, [f"{split}-{i}.jpg" for i in range(len(records))]
    write_index(root / "index", root, [("a", "a"), ("b", "b")], splits, shards)
    return root


def content(root: Path) -> dict[str, bytes]:
    index = open_index(root / "index")
    return {f"{n}/{s}": (index.root / s).read_bytes() for n, split in index.splits.items() for s in split.shards}


def test_copies_everything(packed, tmp_path):
    index, copied = stage_shards(packed, tmp_path / "local", quiet=True)
    assert copied == 3
    assert index.root == (tmp_path / "local").resolve()
    assert index.fingerprint == open_index(packed / "index").fingerprint
    assert content(tmp_path / "local") == content(packed)


def test_reuses_what_is_there(packed, tmp_path):
    local = tmp_path / "local"
    stage_shards(packed, local, quiet=True)
    before = (local / "train-0.tar").stat().st_ino
    assert stage_shards(packed, local, quiet=True)[1] == 0
    assert (local / "train-0.tar").stat().st_ino == before


def test_a_source_that_answers_only_for_what_is_in_its_files(packed, tmp_path, monkeypatch):
    """As rclone's mounts: EIO for extended attributes."""

    def refuse(path, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(os, "listxattr", refuse)
    (packed / "train-0.tar").chmod(0o640)
    _, copied = stage_shards(packed, tmp_path / "local", quiet=True)
    assert copied == 3 and content(tmp_path / "local") == content(packed)
    theirs, ours = ((folder / "train-0.tar").stat() for folder in (packed, tmp_path / "local"))
    assert (ours.st_mode, ours.st_mtime_ns) == (theirs.st_mode, theirs.st_mtime_ns)
    assert stage_shards(packed, tmp_path / "local", quiet=True)[1] == 0


def test_reuses_copies_on_a_file_system_that_keeps_whole_seconds(packed, tmp_path):
    """There every job copied everything again."""
    index, copied = stage_shards(packed, tmp_path / "node", quiet=True)
    for shard in (name for split in index.splits.values() for name in split.shards):
        seconds = (tmp_path / "node" / shard).stat().st_mtime_ns // 10**9
        os.utime(tmp_path / "node" / shard, ns=(seconds * 10**9, seconds * 10**9))
    assert copied and stage_shards(packed, tmp_path / "node", quiet=True)[1] == 0


def test_mends_what_was_cut_or_changed(packed, tmp_path):
    local = tmp_path / "local"
    stage_shards(packed, local, quiet=True)
    (local / "train-1.tar").write_bytes(b"cut")
    os.utime(local / "sub/val-0.tar", (1, 1))
    assert stage_shards(packed, local, quiet=True)[1] == 2
    assert content(local) == content(packed)


@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_shards_that_were_packed_there_are_not_overwritten(packed, tmp_path, capsys, url):
    """Arguments in the wrong order: the files have the same names."""
    other = shutil.copytree(packed, tmp_path / "other")
    (other / "pack.json").write_text("{}")
    meta = json.loads((other / "index/index.json").read_text())
    (other / "index/index.json").write_text(json.dumps({**meta, "fingerprint": "0123"}))
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert main(["stage", url.format(packed), str(other)]) == 2
    assert "holds other shards, packed there (fingerprint 0123)" in capsys.readouterr().err
    after = {path: path.read_bytes() for path in other.rglob("*") if path.is_file() and path.name != ".stage.lock"}
    assert after == before


@pytest.mark.parametrize("source_is_damaged", [False, True])
def test_a_copy_is_compared_with_the_index(packed, tmp_path, monkeypatch, capsys, source_is_damaged):
    """The sizes agree. What was damaged on its way is copied again; a damaged source is named, and copied as it is."""
    shard, before = packed / "train-1.tar", content(packed)
    data = bytearray(shard.read_bytes())
    data[1500] ^= 1
    if source_is_damaged:
        shard.write_bytes(data)
    else:
        real = Path.open

        def open_damaged(self, *args, **kwargs):
            if self == shard:
                monkeypatch.setattr(Path, "open", real)
                return io.BytesIO(data)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(stage, "THREADS", 1)
        monkeypatch.setattr(Path, "open", open_damaged)
    stage_shards(packed, tmp_path / "local", quiet=True)
    err = capsys.readouterr().err
    if source_is_damaged:
        assert f"{shard}: does not hold what its index names, and neither does the copy; see: pipeline verify" in err
    else:
        assert f"{shard}: was damaged on its way, and is copied again" in err
        assert content(tmp_path / "local") == before
    assert err.count("\n") == 1
    assert content(tmp_path / "local") == content(packed)


def test_a_source_that_fails_is_not_called_unwritable(packed, tmp_path):
    shard = packed / "train-1.tar"
    shard.unlink()
    shard.symlink_to("/proc/self/mem")  # reading its first bytes is an input/output error
    with pytest.raises(TransientError, match=f"can't read {shard} "):
        stage_shards(packed, tmp_path / "local", quiet=True)


def test_after_an_error_the_rest_is_not_copied(packed, tmp_path, monkeypatch):
    """Ctrl-C is such an error, and the rest may be a hundred gigabytes."""
    left, stopped = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            stopped.set()
            super().shutdown(wait=wait)

    def copy(there, *_):
        left.append(there.name)
        if len(left) == 1:
            raise KeyboardInterrupt
        stopped.wait(60)

    monkeypatch.setattr(stage, "THREADS", 1)
    monkeypatch.setattr(stage, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(stage, "copy_file", copy)
    with pytest.raises(KeyboardInterrupt):
        stage_shards(packed, tmp_path / "local", quiet=True)
    assert len(left) <= 2


def test_killed_midway_leaves_no_half_shard(packed, tmp_path):
    """A copy that was killed left its temporary file: no shard is half there, and the next copy is whole."""
    local = tmp_path / "local"
    local.mkdir()
    (local / ".train-0.tar.stage.tmp").write_bytes(b"half")
    stage_shards(packed, local, quiet=True)
    assert content(local) == content(packed)
    assert not list(local.rglob("*.tmp"))


def test_index_elsewhere(packed, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    index = open_index(packed / "index")
    splits = {k: (np.array(s.records), [s.name(i) for i in range(len(s))]) for k, s in index.splits.items()}
    shards = {name: split.shards for name, split in index.splits.items()}
    write_index(elsewhere, packed, list(zip(index.synsets, index.words, strict=True)), splits, shards)
    shutil.rmtree(packed / "index")
    staged, _ = stage_shards(packed, tmp_path / "local", index=elsewhere, quiet=True)
    assert staged.root == (tmp_path / "local").resolve()


def test_a_tree_is_refused(synthetic_root, tmp_path):
    from pipeline.dataset.index.scan import build_index

    tree = tmp_path / "tree"
    shutil.copytree(synthetic_root, tree)
    build_index(tree)
    with pytest.raises(UserError, match="pack"):
        stage_shards(tree, tmp_path / "local", quiet=True)


def test_a_missing_shard_is_named(packed, tmp_path, capsys):
    (packed / "train-1.tar").unlink()
    assert main(["stage", str(packed), str(tmp_path / "local")]) == 2
    assert "train-1.tar" in capsys.readouterr().err


def test_a_full_disk_is_seen_before(packed, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="free"):
        stage_shards(packed, tmp_path / "local", quiet=True)
    assert not list((tmp_path / "local").glob("*.tar"))


def test_a_second_job_on_the_node_waits(packed, tmp_path):
    local = tmp_path / "local"
    local.mkdir()
    command = [sys.executable, "-m", "pipeline", "stage", str(packed), str(local)]
    with locked_folder(local):
        other = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert "waiting" in other.stdout.readline()
        assert not list(local.glob("*.tar"))
    out, _ = other.communicate(timeout=60)
    assert other.returncode == 0 and "3 of 3 shards copied" in out
