"""Packing: shards that `webdataset` reads, samples by offset, the same bytes whoever writes them, after any kill."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image
from test_index import change_label, make_folder

from pipeline import TrainLoader
from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.left_out import count_images
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards import format as shards
from pipeline.dataset.shards import pack
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.shards.stage import stage_shards
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.errors import UserError

SMALL = Settings(classes=3, train_per_class=110, val_per_class=8, size=160, oddities=30)
OPTIONS = Options(shard_mb=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An indexed tree of some 2 MB; never changed (copy it first)."""
    root = tmp_path_factory.mktemp("source") / "set"
    generate_tree(root, SMALL)
    build_index(root)
    return root


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    dest = tmp_path_factory.mktemp("packed") / "shards"
    pack_tree(source, dest, OPTIONS)
    return dest


@pytest.fixture
def copy(source, tmp_path) -> Path:
    shutil.copytree(source, tmp_path / "set")
    return tmp_path / "set"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_index_is_the_sources_and_every_sample_is_found_by_offset(source, packed):
    tree, made = build_index(source), open_index(packed / "index")
    assert made.fingerprint == tree.fingerprint
    assert (made.synsets, made.words) == (tree.synsets, tree.words)
    assert len(made.splits["train"].shards) > 1
    for name, split in made.splits.items():
        for i, record in enumerate(split.records):
            with (packed / split.shards[record["shard"]]).open("rb") as file:
                file.seek(record["offset"])
                data = file.read(record["size"])
            assert data == tree.splits[name].path(i).read_bytes() == split.read(i)
            assert Path(split.name(i)).stem == Path(tree.splits[name].name(i)).stem


def test_the_loaders_source_reads_the_shards(packed):
    from pipeline.loader.source import Source

    split = open_index(packed / "index").splits["train"]
    source = Source(split)
    for i in range(0, len(split), 7):
        assert xxhash.xxh3_64_intdigest(source.read(i)) == split.records["digest"][i]


def test_webdataset_reads_every_sample_once_with_its_label(source, packed):
    import webdataset

    tree = build_index(source)
    for split, of_split in open_index(packed / "index").splits.items():
        urls = [str(packed / shard) for shard in of_split.shards]
        data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg;png", "cls")
        seen = {key: (image, label) for key, image, label in data}
        assert len(seen) == len(of_split)
        for i, record in enumerate(tree.splits[split].records):
            key = f"{tree.synsets[record['label']]}/{Path(tree.splits[split].name(i)).stem}"
            image, label = seen[key]
            assert (label, image.size) == (record["label"], (record["width"], record["height"]))


@pytest.mark.parametrize("name", ["a/b.jpg", "é" * 50, "x" * 100, "x" * 101, "\udcff.jpg"])
@pytest.mark.parametrize("size", [0, 511, 8**11 - 1, 8**11])
def test_headers_are_those_of_tarfile(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert shards.tar_header(name, size) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def test_shards_hold_all_classes_mixed_and_about_the_size_asked_for(packed):
    split = open_index(packed / "index").splits["train"]
    for number in range(len(split.shards)):
        assert len(np.unique(split.records["label"][split.records["shard"] == number])) == 3
        assert 0.6e6 < (packed / split.shards[number]).stat().st_size < 1.5e6


def test_bytes_depend_on_nothing_but_source_options_and_seed(source, packed, tmp_path):
    pack_tree(source, tmp_path / "two", OPTIONS, processes=2)
    assert contents(tmp_path / "two") == contents(packed)
    with tarfile.open(packed / "train-000000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "")}
    pack_tree(source, tmp_path / "seed", Options(shard_mb=1, seed=1), processes=1)
    assert (tmp_path / "seed/train-000000.tar").read_bytes() != (packed / "train-000000.tar").read_bytes()
    assert open_index(tmp_path / "seed/index").fingerprint == open_index(packed / "index").fingerprint


@pytest.mark.parametrize("replaces", [0, 2, 3, 6, 9, 14])
def test_a_kill_at_any_moment_is_mended_by_the_same_command(source, packed, tmp_path, replaces, capsys):
    """Renames in order: the marker; for each of 4 shards its records and itself; the index's files; the end."""
    code = f"""
import os, signal, sys
from pathlib import Path
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
real, left = Path.replace, [{replaces}]
def replace(self, target):
    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(self, target)
Path.replace = replace
pack_tree(Path(sys.argv[1]), Path(sys.argv[2]), Options(shard_mb=1), processes=1)
"""
    dest = tmp_path / "shards"
    done = subprocess.run([sys.executable, "-c", code, str(source), str(dest)], check=False)
    assert done.returncode == -signal.SIGKILL
    whole = {path: path.stat().st_mtime_ns for path in dest.glob("*.tar")}
    assert len(whole) == min(4, max(0, replaces - 1) // 2)
    assert main(["pack", str(source), str(dest), "--shard-mb", "1", "--processes", "1"]) == 0
    assert contents(dest) == contents(packed)
    assert whole == {path: path.stat().st_mtime_ns for path in whole}
    assert (f"{len(whole)} of 4 shards exist already" in capsys.readouterr().err) is bool(whole)


def test_parts_in_any_order_make_the_same_as_one(source, packed, tmp_path, capsys):
    argv = ["pack", str(source), str(tmp_path / "shards"), "--shard-mb", "1", "--processes", "1"]
    assert main([*argv, "--part", "2/3"]) == 0
    assert "when all parts are, run the same command without --part" in capsys.readouterr().out
    assert not (tmp_path / "shards/index").exists()
    assert [path.name for path in (tmp_path / "shards").glob("*.tar")] == ["train-000001.tar"]
    assert main([*argv, "--part", "3/3"]) == 0
    assert main([*argv, "--part", "1/3"]) == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")}
    assert main(argv) == 0
    assert contents(tmp_path / "shards") == contents(packed)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_a_part_does_not_index_on_its_own(copy, tmp_path, capsys):
    shutil.rmtree(copy / "index")
    assert main(["pack", str(copy), str(tmp_path / "x"), "--part", "1/2"]) == 2
    assert f"run first: pipeline index {copy}" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "x"])
def test_a_wrong_part_is_one_line(source, tmp_path, capsys, part):
    assert main(["pack", str(source), str(tmp_path / "x"), "--part", part]) == 2
    assert f"--part is {part}; give I/N" in capsys.readouterr().err


def test_second_run_writes_nothing_and_a_lost_shard_is_written_again(source, packed, tmp_path):
    dest = tmp_path / "shards"
    shutil.copytree(packed, dest)
    times = {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    pack_tree(source, dest, OPTIONS)
    assert times == {path: path.stat().st_mtime_ns for path in dest.rglob("*")}
    (dest / "train-000001.tar").unlink()
    pack_tree(source, dest, OPTIONS)
    assert contents(dest) == contents(packed)


def test_short_side_shrinks_train_and_leaves_small_ones_and_val_alone(source, tmp_path):
    tree = build_index(source)
    made = pack_tree(source, tmp_path / "shards", Options(short_side=100, quality=85, shard_mb=1))
    assert made.splits["val"].records["digest"].tolist() == tree.splits["val"].records["digest"].tolist()
    train, before = made.splits["train"], tree.splits["train"].records
    large = np.minimum(before["width"], before["height"]) > 100
    assert 0.2 < large.mean() < 1
    after = train.records
    assert (np.minimum(after["width"], after["height"])[large] == 100).all()
    assert (after["digest"][~large] == before["digest"][~large]).all()
    ratio = (after["width"] / after["height"]) / (before["width"] / before["height"])
    assert abs(ratio - 1).max() < 0.02
    for i in np.flatnonzero(large):
        data = train.read(i)
        with Image.open(BytesIO(data)) as image, Image.open(tree.splits["train"].path(i)) as original:
            assert image.format == "JPEG"
            assert image.mode == ("L" if original.mode == "L" else "RGB")
            assert image.size == (after["width"][i], after["height"][i])
            assert not image.getexif()
            theirs = original.convert(image.mode).resize(image.size, Image.Resampling.LANCZOS)
            assert np.abs(np.asarray(image, int) - np.asarray(theirs, int)).mean() < 6
        assert xxhash.xxh3_64_intdigest(data) == after["digest"][i]
    all_small = pack_tree(source, tmp_path / "all", Options(short_side=100, quality=30, shard_mb=1, resize_val=True))
    assert (all_small.splits["val"].records["height"].clip(0, all_small.splits["val"].records["width"]) <= 100).all()
    assert all_small.splits["train"].records["size"][large].sum() < 0.7 * after["size"][large].sum()


@pytest.fixture
def damaged(tmp_path) -> Path:
    root = tmp_path / "damaged"
    generate_tree(root, Settings(classes=2, train_per_class=12, val_per_class=3, size=96, oddities=0, damaged=4))
    return root


def test_unreadable_images_are_refused_by_name(damaged, tmp_path, capsys):
    assert main(["pack", str(damaged), str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert re.search(r"5 images of .* can't be read, such as ILSVRC\S+JPEG .*--unreadable skip .* reencode", err)
    assert not (tmp_path / "x").exists()


def test_unreadable_images_are_left_out_when_told(damaged, tmp_path):
    made = pack_tree(damaged, tmp_path / "x", Options(unreadable="skip"))
    assert len(made.splits["train"]) == 20
    assert made.fingerprint == build_index(damaged).fingerprint
    assert count_images(made.left_out, "train") == len(read_unreadable(build_index(damaged).folder)["train"])
    again = pack_tree(tmp_path / "x", tmp_path / "y", Options())  # shards of shards: still missing
    assert again.left_out == made.left_out


def test_unreadable_images_are_saved_as_far_as_they_go(damaged, tmp_path, capsys):
    listed = [entry["file"] for entry in read_unreadable(build_index(damaged).folder)["train"]]
    assert main(["pack", str(damaged), str(tmp_path / "x"), "--unreadable", "reencode"]) == 0
    out = capsys.readouterr().out
    notes = {note["file"]: note["done"] for note in json.loads((tmp_path / "x/unreadable.json").read_text())["train"]}
    assert sorted(notes) == sorted(listed)
    assert sorted(notes.values()) == ["left out"] * 3 + ["re-encoded"]
    assert count_images(open_index(tmp_path / "x/index").left_out, "train") == 3
    for name, done in notes.items():
        assert f"{name}: {done}" in out
    saved = Path(next(name for name, done in notes.items() if done == "re-encoded")).stem
    train = open_index(tmp_path / "x/index").splits["train"]
    names = [train.name(i) for i in range(len(train))]
    assert len(names) == 21
    number = names.index(f"{saved.split('_')[0]}/{saved}.jpg")
    with Image.open(BytesIO(train.read(number))) as image:
        image.load()
        assert np.asarray(image)[:4].std() > 1
    keys = [(label, f"{Path(name).stem}.JPEG") for label, name in zip(train.records["label"], names, strict=True)]
    assert keys == sorted(keys), "a saved image stands where ImageFolder would put it"


def test_an_image_changed_since_indexing_is_one_line(copy, tmp_path, capsys):
    path = build_index(copy).splits["train"].path(17)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert main(["pack", str(copy), str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"image \S+{path.name} has changed since it was indexed; run pipeline verify", err)
    assert not list((tmp_path / "x").glob("*.tar*")) or list((tmp_path / "x").glob("val*.tar"))
    assert not (tmp_path / "x/index").exists()


def test_other_folders_and_other_options_are_refused(source, packed, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        pack_tree(source, tmp_path, OPTIONS)
    with pytest.raises(UserError, match="was packed with short_side None instead of 64"):
        pack_tree(source, packed, Options(shard_mb=1, short_side=64))
    with pytest.raises(UserError, match="was packed with shard_mb 1 instead of 2"):
        pack_tree(source, packed, Options(shard_mb=2))


@pytest.mark.parametrize("option", ["--short-side=3", "--quality=0", "--quality=101", "--shard-mb=0", "--processes=-1"])
def test_impossible_options_are_one_line(source, tmp_path, capsys, option):
    assert main(["pack", str(source), str(tmp_path / "x"), option]) == 2
    assert re.search(r"is -?\d+; give a number from", capsys.readouterr().err)


def test_too_little_room_is_told_before_the_first_byte(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"0\.0 GB free, but 0\.0 GB are needed"):
        pack_tree(source, tmp_path / "x", OPTIONS)


def test_a_disk_that_fills_up_leaves_no_half_shard(source, tmp_path, monkeypatch):
    real = shards.ShardWriter._member

    def member(self, name, data):
        if self.bytes > 500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, name, data)

    monkeypatch.setattr(shards.ShardWriter, "_member", member)
    with pytest.raises(UserError, match=r"can't write .*train-000000\.tar \(No space left on device\)"):
        pack_tree(source, tmp_path / "x", OPTIONS, processes=1)
    assert not [path.name for path in (tmp_path / "x").iterdir() if "train" in path.name]


def test_two_writers_of_one_shard_do_not_mix(source, tmp_path, capsys):
    with shards.ShardWriter(tmp_path / "x", "train", 0) as writer:
        writer.add(shards.Sample("n1/a", "jpg", b"first", 0, 1, 1, 0))
        with pytest.raises(UserError, match=r"another process is writing .*train-000000\.tar"):
            shards.ShardWriter(tmp_path / "x", "train", 0).__enter__()
    with tarfile.open(tmp_path / "x/train-000000.tar") as tar:
        assert tar.extractfile("n1/a.jpg").read() == b"first"


def test_a_damaged_index_of_the_shards_is_made_again(source, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "shards")
    (tmp_path / "shards/index/index.json").write_text("{")
    pack_tree(source, tmp_path / "shards", OPTIONS)
    assert contents(tmp_path / "shards") == contents(packed)


def test_shards_with_a_changed_label_in_their_index_are_refused_and_made_again(source, packed, tmp_path, capsys):
    shards = shutil.copytree(packed, tmp_path / "shards")
    change_label(shards / "index")
    stop = r"is damaged \(its records were changed\); run the same pack or stage command"
    for use in (
        build_index,
        lambda root: stage_shards(root, tmp_path / "copy"),
        lambda root: TrainLoader(root).classes,
    ):
        with pytest.raises(UserError, match=stop):
            use(shards)
    pack_tree(source, shards, OPTIONS)
    assert contents(shards) == contents(packed)


def test_what_was_asked_for_goes_along_and_a_damaged_receipt_is_told_first(copy, tmp_path):
    (copy / "fetch.json").write_text(json.dumps({"selected": {"train": ["n99000001"], "val": "all"}}))
    pack_tree(copy, tmp_path / "shards", OPTIONS)
    selected = json.loads((tmp_path / "shards/pack.json").read_text())["selected"]
    assert selected == {"train": ["n99000001"], "val": "all"}
    (copy / "fetch.json").write_text("{")
    with pytest.raises(UserError, match=r"fetch\.json can't be read"):
        pack_tree(copy, tmp_path / "other", OPTIONS)
    assert not (tmp_path / "other").exists()


def test_names_that_would_share_a_key_stay_apart(tmp_path):
    """Dots end a key for `webdataset`, suffixes are no part of it, and folders below a class are."""
    import webdataset

    names = ["a.jpg", "a.png", "a.b.jpg", "a-b.jpg", "v1.2/a.jpg", "v1.2/x.y.z.jpg", "long/" * 40 + "a.jpg", "ä ö.jpg"]
    for number, name in enumerate(names):
        path = tmp_path / "set/train/class.one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10 + number, 9), (9 * number, 7, 99)).save(path)
    shutil.copytree(tmp_path / "set/train", tmp_path / "set/val")
    tree = build_index(tmp_path / "set").splits["train"]
    split = pack_tree(tmp_path / "set", tmp_path / "x", Options()).splits["train"]
    urls = [str(tmp_path / "x" / shard) for shard in split.shards]
    seen = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert sorted(next(s[k] for k in ("jpg", "png") if k in s).width for s in seen) == list(range(10, 18))
    assert all(sample["cls"] == 0 for sample in seen)
    assert len({sample["__key__"] for sample in seen}) == len(names)
    for i in range(len(split)):
        assert split.read(i) == tree.path(i).read_bytes()


def test_packed_shards_can_be_packed_again(source, packed, tmp_path):
    made = pack_tree(packed, tmp_path / "again", Options(shard_mb=2))
    assert made.fingerprint == open_index(packed / "index").fingerprint
    assert len(made.splits["train"].shards) == 1
    tree = open_index(packed / "index").splits["train"]
    assert [made.splits["train"].name(i) for i in range(9)] == [tree.name(i) for i in range(9)]


def test_lists_go_along_and_a_lost_index_is_told(source, packed, tmp_path, capsys):
    for name in ("LOC_val_solution.csv", "LOC_synset_mapping.txt", "ILSVRC/ImageSets/CLS-LOC/train_cls.txt"):
        assert (packed / name).read_bytes() == (source / name).read_bytes()
    shutil.copytree(packed, tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards/index")
    for verb in ("index", "verify"):
        assert main([verb, str(tmp_path / "shards")]) == 2
        assert "run the same pack command again" in capsys.readouterr().err
    pack_tree(source, tmp_path / "shards", OPTIONS)
    assert contents(tmp_path / "shards") == contents(packed)


@pytest.mark.parametrize("late", ["index", "train/a"])
def test_a_part_waits_for_folders_that_a_network_file_system_shows_late(tmp_path, late):
    root, dest = tmp_path / "set", tmp_path / "out"
    make_folder(root, {f"{split}/{kind}": ["1.png", "2.png"] for split in ("train", "val") for kind in "ab"})
    build_index(root)
    (root / late).rename(tmp_path / "away")
    timer = threading.Timer(0.5, (tmp_path / "away").rename, [root / late])
    timer.start()
    assert main(["pack", str(root), str(dest), "--part", "1/1", "--processes", "1"]) == 0
    timer.join()
    assert len(list(dest.glob("*.tar"))) == 2
