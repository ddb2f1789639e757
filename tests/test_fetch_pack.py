"""`fetch --pack`: members straight into shards, the same bytes as a fetch and a pack, killed anywhere."""

import random
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fetching import BASE, QUICK, fetch, fetch_from
from kaggle_server import Faults, KaggleServer
from test_fetch_kill import kill_when

from pipeline.__main__ import main
from pipeline.dataset.acquire.access.remote import LocalFile
from pipeline.dataset.acquire.zip_directory import read_directory
from pipeline.dataset.index.index import index_folder, open_index
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.verify.verify import verify_root

SHARDED = ("--pack", "--shard_mb", "1")


@pytest.fixture(scope="module")
def big_zip(kaggle_members, tmp_path_factory) -> Path:
    """The members with 20 kB behind each training image, so that there are several shards of 1 MB."""
    path = tmp_path_factory.mktemp("big") / "imagenet-object-localization-challenge.zip"
    filler = random.Random(0)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kaggle_members.items():
            more = filler.randbytes(20_000) if name.startswith(f"{BASE}/train/") else b""
            archive.writestr(name, data + more)
    return path


@pytest.fixture(scope="module")
def packed(big_zip, tmp_path_factory) -> Path:
    """What a fetch and a pack of that archive make."""
    folder = tmp_path_factory.mktemp("packed")
    assert fetch(folder / "tree", {}, "--from", str(big_zip)).code == 0
    pack_tree(folder / "tree", folder / "shards", Options(shard_mb=1))
    return folder / "shards"


def shards_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def assert_same(dest: Path, packed: Path) -> None:
    assert shards_of(dest) == shards_of(packed)
    ours, theirs = open_index(index_folder(dest)), open_index(index_folder(packed))
    assert ours.fingerprint == theirs.fingerprint
    for split, of_split in theirs.splits.items():
        assert list(ours.splits[split].iter_names()) == list(of_split.iter_names())
    assert not list(dest.glob(".*.tmp")) and not (dest / BASE).exists()


def test_shards_are_those_of_fetch_and_pack(big_zip, packed, tmp_path):
    with KaggleServer(big_zip) as server:
        env = server.environment(tmp_path / "home")
        done = fetch(tmp_path / "data", env, *SHARDED)
        assert done.code == 0, done.err
        assert "complete and verified: 96 train and 24 val images" in done.out
        assert len(shards_of(packed)) > 2
        assert_same(tmp_path / "data", packed)
        assert verify_root(tmp_path / "data").good
        calls = len(server.api_calls)
        assert fetch(tmp_path / "data", env, *SHARDED).code == 0
        assert len(server.api_calls) == calls
        (tmp_path / "data/train-000000.tar").unlink()
        before = server.total_sent
        assert fetch(tmp_path / "data", env, *SHARDED).code == 0
        assert server.total_sent - before < 0.7 * big_zip.stat().st_size, "the other shards are kept"
    assert_same(tmp_path / "data", packed)


def test_disk_holds_the_shards_and_5_percent(big_zip, packed, tmp_path):
    largest, lock = [0], threading.Lock()

    def measure(_total):
        with lock:
            files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
            largest[0] = max(largest[0], sum(512 * path.stat().st_blocks for path in files))

    with KaggleServer(big_zip, Faults(on_sent=measure)) as server:
        assert fetch_from(server, tmp_path, *SHARDED).code == 0
    measure(0)
    data = sum(map(len, shards_of(packed).values()))
    assert data <= largest[0] <= 1.05 * data + 200_000, "200 kB: what a million images need no more of"


def test_killed_at_random_moments(big_zip, packed, tmp_path):
    rng, dest, before = random.Random(2), tmp_path / "data", 0
    directory = len(read_directory(LocalFile(big_zip)).blob) + 66_000
    with KaggleServer(big_zip) as server:
        env = server.environment(tmp_path / "home")
        for _ in range(4):
            reached = threading.Event()
            limit = server.total_sent + 2 * directory + rng.randrange(600_000)
            server.faults.on_sent = lambda total, e=reached, limit=limit: e.set() if total >= limit else None
            assert kill_when(reached, dest, env, *SHARDED) in (-9, 0)
        before = server.total_sent
        assert fetch_from(server, tmp_path, *SHARDED).code == 0
        assert server.total_sent - before < big_zip.stat().st_size - 300_000, "what is whole is not fetched again"
    assert_same(dest, packed)


def test_some_classes(big_zip, tmp_path):
    done = fetch(tmp_path / "data", {}, "--from", str(big_zip), "--pack", "--classes", "2")
    assert done.code == 0, done.err
    index = open_index(index_folder(tmp_path / "data"))
    assert {split: len(samples) for split, samples in index.splits.items()} == {"train": 48, "val": 12}
    assert verify_root(tmp_path / "data").good


def test_damage_on_disk_is_found_and_fetched_again(big_zip, packed, tmp_path, monkeypatch, capsys):
    from pipeline.dataset.acquire import fetch_pack

    real, left = fetch_pack.Packing.finish, [1]

    def damage_first(self):
        path = fetch_pack.temporary_path(self.dest, "train", 1)
        if left[0]:
            left[0] = 0
            with path.open("r+b") as file:
                file.seek(700)
                file.write(b"damaged")
        return real(self)

    monkeypatch.setattr(fetch_pack.Packing, "finish", damage_first)
    command = ["fetch", str(tmp_path / "data"), "--from", str(big_zip), *SHARDED]
    assert main(command) == 1
    assert "does not hold what was written" in capsys.readouterr().err
    assert main(command) == 0
    assert_same(tmp_path / "data", packed)


def test_tree_and_shards_do_not_mix(big_zip, nested_kaggle_zip, kaggle_zip, tmp_path):
    tree, shards = tmp_path / "tree", tmp_path / "shards"
    assert fetch(tree, {}, "--from", str(kaggle_zip), *QUICK).code == 0
    done = fetch(tree, {}, "--from", str(kaggle_zip), "--pack")
    assert done.code == 2 and "holds a tree" in done.last_line
    assert fetch(shards, {}, "--from", str(kaggle_zip), "--pack").code == 0
    done = fetch(shards, {}, "--from", str(kaggle_zip))
    assert done.code == 2 and "packed shards" in done.last_line
    done = fetch(shards, {}, "--from", str(big_zip), "--pack")
    assert done.code == 0, "nothing is missing"
    done = fetch(shards, {}, "--from", str(kaggle_zip), "--pack", "--restart")
    assert done.code == 2
    assert f"restart None instead of 8; give another folder, or make these from it: pipeline pack {shards} DEST" in (
        done.last_line
    )
    done = fetch(tmp_path / "nested", {}, "--from", str(nested_kaggle_zip), "--pack")
    assert done.code == 2 and "pipeline pack" in done.last_line


def test_shards_that_were_checked_before_a_stop_stay(big_zip, packed, tmp_path, monkeypatch, capsys):
    from pipeline.dataset.acquire import fetch_pack

    def stop_after_two(function, tasks):
        for task, _ in zip(tasks, range(2), strict=False):
            yield function(task)
        raise KeyboardInterrupt

    command = ["fetch", str(tmp_path / "data"), "--from", str(big_zip), *SHARDED]
    with monkeypatch.context() as patch:
        patch.setattr(fetch_pack, "map_in_order", stop_after_two)
        assert main(command) == 75
    assert len(shards_of(tmp_path / "data")) == 2
    assert main(command) == 0
    assert "120 of 120 images exist already" in capsys.readouterr().err
    assert_same(tmp_path / "data", packed)


@pytest.fixture(scope="module")
def marked(kaggle_zip, tmp_path_factory) -> Path:
    """What a fetch and `pack --restart 4` make."""
    if shutil.which("jpegtran") is None:
        pytest.skip("jpegtran is not installed")
    folder = tmp_path_factory.mktemp("marked")
    assert fetch(folder / "tree", {}, "--from", str(kaggle_zip)).code == 0
    pack_tree(folder / "tree", folder / "shards", Options(restart=4))
    return folder / "shards"


def assert_same_with_tables(dest: Path, marked: Path) -> None:
    assert_same(dest, marked)
    tables = {path.name: path.read_bytes() for path in marked.glob("*.restart")}
    assert tables and tables == {path.name: path.read_bytes() for path in dest.glob("*.restart")}
    assert verify_root(dest).good
    for split, theirs in open_index(index_folder(marked)).splits.items():
        ours = open_index(index_folder(dest)).splits[split]
        assert theirs.restart["table_size"].any() and np.array_equal(ours.restart, theirs.restart)


def test_restart_markers_are_those_of_pack_restart(kaggle_zip, marked, tmp_path):
    argv = ("--from", str(kaggle_zip), "--pack", "--restart", "4")
    assert fetch(tmp_path / "data", {}, *argv).code == 0
    assert_same_with_tables(tmp_path / "data", marked)
    (tmp_path / "data/train-000000.tar").unlink()
    done = fetch(tmp_path / "data", {}, *argv)
    assert done.code == 0 and "24 of 120 images exist already" in done.err, done.err
    assert_same_with_tables(tmp_path / "data", marked)
    (tmp_path / "data/train-000000.restart").unlink()
    assert fetch(tmp_path / "data", {}, *argv).code == 0
    assert_same_with_tables(tmp_path / "data", marked)
    shutil.rmtree(tmp_path / "data/index")
    done = fetch(tmp_path / "data", {}, *argv)
    assert done.code == 0, "the index is made again, though the marker says complete"
    assert_same_with_tables(tmp_path / "data", marked)
    done = fetch(tmp_path / "data", {}, *argv[:3])
    assert done.code == 2 and "was packed with restart 4 instead of None" in done.last_line
    done = fetch(tmp_path / "other", {}, "--from", str(kaggle_zip), "--restart")
    assert done.code == 2 and "add --pack" in done.last_line


def test_killed_before_the_fetched_shard_is_removed(kaggle_zip, marked, tmp_path, monkeypatch):
    """Of a shard both forms lie there then; the one with markers is whole."""
    from pipeline.dataset.acquire import fetch_pack

    def stop_after_one(function, tasks):
        task = next(iter(tasks))
        fetched = task.path.read_bytes()
        yield function(task)
        task.path.write_bytes(fetched)
        raise KeyboardInterrupt

    command = ["fetch", str(tmp_path / "data"), "--from", str(kaggle_zip), "--pack", "--restart", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(fetch_pack, "map_in_order", stop_after_one)
        assert main(command) == 75
    assert main(command) == 0
    assert_same_with_tables(tmp_path / "data", marked)
