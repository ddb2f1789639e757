"""The index: every kind of tree, ImageFolder's order and labels, unreadable files, rebuilds, kills, damage, speed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from pipeline.__main__ import main
from pipeline.dataset import lock
from pipeline.dataset.index import decode, listing, scan, scan_split
from pipeline.dataset.index.index import RECORD, compute_fingerprint, open_index
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.index.write import write_index
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.errors import TransientError, UserError


def make_folder(root: Path, tree: dict[str, list[str]]) -> Path:
    """Folders with small images, each of its own color: {"train/cat": ["a.png", ...]}."""
    number = 0
    for folder, names in tree.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            number += 1
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + number % 5, 6), (number * 37 % 256, number * 11 % 256, 90)).save(path)
    return root


@pytest.fixture
def pets(tmp_path):
    return make_folder(
        tmp_path / "pets",
        {
            "train/dog": ["10.png", "9.png", "b.JPEG"],
            "train/cat": ["x.jpg", "a/z.jpg", "a-b/y.jpg", "A.bmp"],
            "val/cat": ["v.png"],
            "val/dog": ["w.png", "u.webp"],
        },
    )


def damage(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def test_ilsvrc_root_with_flat_val_is_labelled_by_the_csv(synthetic_root, tmp_path):
    index = build_index(synthetic_root, tmp_path / "index")
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 96, "val": 24}
    words = dict(line.split(" ", 1) for line in (synthetic_root / "LOC_synset_mapping.txt").read_text().splitlines())
    assert index.synsets == tuple(sorted(words))
    assert index.words == tuple(words[synset] for synset in index.synsets)
    rows = (synthetic_root / "LOC_val_solution.csv").read_text().splitlines()[1:]
    truth = {row.split(",")[0]: row.split(",")[1].split()[0] for row in rows}
    val = index.splits["val"]
    assert [index.synsets[label] for label in val.records["label"]] == sorted(truth.values())
    for i in range(len(val)):
        assert truth[Path(val.name(i)).stem] == index.synsets[val.records["label"][i]]
    for split in index.splits.values():
        for i, record in enumerate(split.records):
            data = split.path(i).read_bytes()
            with Image.open(split.path(i)) as image:
                assert (record["width"], record["height"]) == image.size
            assert (record["size"], record["digest"]) == (len(data), xxhash.xxh3_64_intdigest(data))
            assert (record["shard"], record["offset"]) == (-1, 0)


@pytest.mark.parametrize("held_out", ["val", "test", "validation"])
def test_order_and_labels_are_those_of_image_folder(pets, held_out):
    from torchvision.datasets import ImageFolder

    (pets / "val").rename(pets / held_out)
    index = build_index(pets)
    for name, folder in (("train", "train"), ("val", held_out)):
        theirs = ImageFolder(pets / folder)
        split = index.splits[name]
        assert [str(split.path(i)) for i in range(len(split))] == [path for path, _ in theirs.samples]
        assert split.records["label"].tolist() == theirs.targets
        assert list(index.synsets) == theirs.classes


def test_inner_folder_of_the_archive_is_a_data_root_too(synthetic_root, tmp_path):
    inner = build_index(synthetic_root / "ILSVRC/Data/CLS-LOC", tmp_path / "inner")
    outer = build_index(synthetic_root, tmp_path / "outer")
    assert (inner.fingerprint, inner.words) == (outer.fingerprint, outer.words)


def test_unreadable_files_are_listed_with_reason_and_left_out(tmp_path):
    settings = Settings(classes=2, train_per_class=8, val_per_class=2, size=32, oddities=0, damaged=4)
    generate_tree(tmp_path / "set", settings)
    link = tmp_path / "set/ILSVRC/Data/CLS-LOC/train/n99000000/n99000000_99.JPEG"
    link.symlink_to("nowhere")
    index = build_index(tmp_path / "set")
    listed = read_unreadable(index.folder)
    assert (len(index.splits["train"]), len(listed["train"])) == (2 * 8 - 4, 4 + 1)
    assert [entry["reason"] for entry in listed["train"] if entry["file"].endswith("_99.JPEG")] == [
        "No such file or directory"
    ]
    for entry in listed["train"]:
        assert entry["reason"]
        assert entry["class"] in entry["file"]
        assert str(tmp_path) not in entry["reason"]
    kept = {index.splits["train"].name(i) for i in range(len(index.splits["train"]))}
    assert not kept & {entry["file"] for entry in listed["train"]}


def test_an_image_that_lacks_its_last_bytes_is_unreadable(synthetic_root, tmp_path):
    """Its header is whole: only a decode in full finds it."""
    shutil.copytree(
        synthetic_root, tmp_path / "set", ignore=shutil.ignore_patterns("index")
    )  # others may have made one
    path = tmp_path / "set/ILSVRC/Data/CLS-LOC/train/n99000001/n99000001_2.JPEG"
    path.write_bytes(path.read_bytes()[:-60])
    with Image.open(path) as image:
        assert image.size
    index = build_index(tmp_path / "set")
    assert [entry["file"] for entry in read_unreadable(index.folder)["train"]] == [
        str(path.relative_to(tmp_path / "set"))
    ]


def test_command_tells_the_counts_and_where_the_unreadable_are_listed(pets, capsys):
    damage(pets / "train/dog/9.png")
    assert main(["index", str(pets)]) == 0
    out = capsys.readouterr().out
    assert "6 train, 3 val images of 2 classes" in out
    assert "left out of train: 1 unreadable (train/dog/9.png)" in out
    assert str(pets / "index/unreadable.json") in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root), "does not exist"),
        (lambda root: shutil.rmtree(root / "train"), "holds no train/ folder"),
        (lambda root: shutil.rmtree(root / "val"), "neither val/ nor test/"),
        (lambda root: (root / "train/fish").mkdir(), "class folder .*train/fish holds no image"),
        (lambda root: make_folder(root, {"val/fish": ["f.png"]}), "class 'fish' that .*train does not have"),
        (
            lambda root: [damage(p) for p in (root / "train/dog").iterdir()],
            "class 'dog' has no readable image in .*train/dog/.*: .*; put",
        ),
        (lambda root: [shutil.move(p, root / "train") for p in (root / "train").glob("*/*.*")], "holds no image"),
        (lambda root: (root / "train/dog/9.png").rename(root / "train/dog" / os.fsdecode(b"\xff.png")), "not UTF-8"),
    ],
)
def test_a_tree_that_is_no_data_set_is_one_line(pets, capsys, spoil, message):
    import re

    spoil(pets)
    assert main(["index", str(pets)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert re.search(message, err[-1])
    assert len([line for line in err if line.startswith("pipeline index:")]) == 1
    assert "Traceback" not in "".join(err)


def test_flat_images_without_a_list_and_without_a_row(pets, synthetic_root, tmp_path):
    flat = make_folder(tmp_path / "flat", {"train/cat": ["a.png"], "val": ["b.png"]})
    with pytest.raises(UserError, match=r"images but no class folders; expected .*LOC_val_solution\.csv"):
        build_index(flat)
    (flat / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nc,n01440764 1 2 3 4 \n")
    with pytest.raises(UserError, match=r"b\.png has no row in"):
        build_index(flat)


def test_half_sorted_validation_set_loses_no_image(synthetic_root, tmp_path):
    """A valprep that was killed leaves some images flat: they still count, with the same labels."""
    root = tmp_path / "set"
    shutil.copytree(synthetic_root, root)
    before = build_index(root).fingerprint
    val = root / "ILSVRC/Data/CLS-LOC/val"
    rows = (root / "LOC_val_solution.csv").read_text().splitlines()[1:]
    for row in rows[:9]:
        name, words = row.split(",")
        (val / words.split()[0]).mkdir(exist_ok=True)
        (val / f"{name}.JPEG").rename(val / words.split()[0] / f"{name}.JPEG")
    index = build_index(root)
    assert len(index.splits["val"]) == 24
    assert index.fingerprint == before


def test_stray_images_beside_class_folders_belong_to_no_class(pets):
    make_folder(pets, {"train": ["overview.png"], "val": ["overview.png"]})
    index = build_index(pets)
    assert {name: len(split) for name, split in index.splits.items()} == {"train": 7, "val": 3}


def test_second_run_neither_walks_nor_opens_an_image(pets, monkeypatch):
    first = build_index(pets)

    def never(*_):
        raise AssertionError("walked or decoded again")

    monkeypatch.setattr(listing._Walk, "read", never)
    monkeypatch.setattr(scan_split, "inspect_all", never)
    assert build_index(pets).fingerprint == first.fingerprint


def test_rebuild_reads_only_what_changed(pets, monkeypatch):
    build_index(pets)
    read, inspect_all = [], scan_split.inspect_all
    monkeypatch.setattr(scan_split, "inspect_all", lambda paths: read.extend(paths) or inspect_all(paths))
    make_folder(pets, {"train/cat": ["new.png"]})
    (pets / "train/dog/9.png").unlink()
    index = build_index(pets)
    assert read == [str(pets / "train/cat/new.png")]
    assert len(index.splits["train"]) == 7
    shutil.rmtree(pets / "index")
    assert build_index(pets).fingerprint == index.fingerprint
    build_index(make_folder(pets, {"train/cat": ["newer.png"]}))
    files = sorted(path.name.partition("-")[0] for path in (pets / "index").iterdir() if path.name != scan.LOCK)
    assert files == ["index.json", "train", "train", "unreadable.json", "val", "val"], "of earlier indexes"


def test_the_command_reads_images_that_were_rewritten_in_place(pets, capsys):
    """Their folders keep their times, so that a start of training does not see it; this is what it is told to type."""
    before = build_index(pets)
    path = pets / "train/cat/x.jpg"
    with Image.open(path) as image:
        smaller = image.resize((5, 4))
    with path.open("wb") as file:
        smaller.save(file, "JPEG")
    assert build_index(pets).fingerprint == before.fingerprint
    assert main(["verify", str(pets)]) == 2
    assert f"changed on purpose, run: pipeline index {pets}" in capsys.readouterr().out
    assert main(["index", str(pets)]) == 0
    after = open_index(pets / "index")
    assert after.fingerprint != before.fingerprint
    assert main(["verify", str(pets)]) == 0
    assert main(["index", str(pets)]) == 0 and open_index(pets / "index").fingerprint == after.fingerprint


def test_a_changed_csv_changes_the_labels(synthetic_root, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(synthetic_root, root)
    build_index(root)
    path = root / "LOC_val_solution.csv"
    rows = path.read_text().replace("n99000000", "n99000001")
    path.write_text(rows)
    assert 0 not in build_index(root).splits["val"].records["label"]


def test_one_process_and_many_make_the_same_index(tmp_path, monkeypatch):
    settings = Settings(classes=4, train_per_class=40, val_per_class=2, size=24, oddities=6, damaged=3)
    generate_tree(tmp_path / "set", settings)
    one = build_index(tmp_path / "set", tmp_path / "one", processes=1)
    two = build_index(tmp_path / "set", tmp_path / "two", processes=2)
    for split in one.splits:
        assert np.array_equal(one.splits[split].records, two.splits[split].records)
    assert one.fingerprint == two.fingerprint
    assert read_unreadable(one.folder) == read_unreadable(two.folder)


def test_fingerprint_is_of_content_and_order_not_of_place(pets, tmp_path):
    here = build_index(pets)
    shutil.copytree(pets, tmp_path / "elsewhere")
    there = build_index(tmp_path / "elsewhere")
    assert there.fingerprint == here.fingerprint
    records = np.array(here.splits["train"].records)
    for field, same in (("mtime_ns", True), ("offset", True), ("digest", False), ("label", False), ("width", False)):
        changed = records.copy()
        changed[field][0] += 1
        assert (
            compute_fingerprint(here.synsets, {"train": changed})
            == compute_fingerprint(here.synsets, {"train": records})
        ) is same
    assert compute_fingerprint(here.synsets, {"train": records[::-1]}) != compute_fingerprint(
        here.synsets, {"train": records}
    )


def test_a_moved_data_root_keeps_its_index(pets, tmp_path, monkeypatch):
    monkeypatch.chdir(pets.parent)
    build_index(Path("pets"))
    shutil.move(pets, tmp_path / "moved")
    monkeypatch.setattr(scan, "list_places", None)
    index = build_index(tmp_path / "moved")
    assert index.splits["train"].path(0).is_file()


def corrupt_json(folder):
    (folder / "index.json").write_text("{")


def cut_records(folder):
    path = next(folder.glob("train-*.npy"))
    path.write_bytes(path.read_bytes()[:-7])


def cut_names(folder):
    path = next(folder.glob("val-*.names"))
    path.write_bytes(path.read_bytes()[:-1])


def other_format(folder):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def climb_out(folder):
    path = folder / "index.json"
    meta = json.loads(path.read_text())
    meta["splits"]["train"]["records"] = "../../secret.npy"
    path.write_text(json.dumps(meta))


def lose_file(folder):
    next(folder.glob("val-*.npy")).unlink()


@pytest.mark.parametrize("spoil", [corrupt_json, cut_records, cut_names, other_format, climb_out, lose_file])
def test_damaged_index_is_one_line_and_built_anew_on_demand(pets, spoil, capsys):
    index = build_index(pets)
    spoil(index.folder)
    with pytest.raises(UserError, match="build it again with: pipeline index ROOT") as caught:
        open_index(index.folder)
    assert "\n" not in str(caught.value)
    assert build_index(pets).fingerprint == index.fingerprint
    assert "rebuilding it" in capsys.readouterr().err


def change_label(folder):
    """As a flipped bit on the disk does; the main file and all sizes stay as they were."""
    records = np.load(next(folder.glob("train-????????????????.npy")), mmap_mode="r+")
    records["label"][0] += 1
    records.flush()


def change_name(folder):
    path = next(folder.glob("train-names-*.names"))
    data = bytearray(path.read_bytes())
    data[8] ^= 0x80  # no UTF-8 any more
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [change_label, change_name])
def test_an_index_that_was_changed_on_the_disk_is_not_believed(pets, spoil, capsys):
    """Digests protect the pixels of an image, and nothing else its label, its size and its name."""

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (pets / "index").iterdir()}

    build_index(pets)
    before = contents()
    spoil(pets / "index")
    assert contents() != before
    build_index(pets)
    assert "is damaged (its records were changed); rebuilding it" in capsys.readouterr().err
    assert contents() == before


def test_unwritable_index_folder_is_one_line(pets):
    (pets / "index").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"can't write the index into .* choose another folder"):
        build_index(pets)


def run_killed(root: Path, patch: str) -> None:
    """Index `root` in a process that kills itself with SIGKILL where `patch` says."""
    code = f"""
import os, signal, sys
from pathlib import Path
from pipeline.dataset.index import scan
def die(): os.kill(os.getpid(), signal.SIGKILL)
{patch}
scan.build_index(Path(sys.argv[1]), processes=1)
"""
    done = subprocess.run([sys.executable, "-c", code, str(root)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("replace_number", [0, 2, 5])
def test_index_survives_a_kill_while_it_is_written(pets, replace_number):
    before = build_index(pets).fingerprint
    make_folder(pets, {"train/cat": ["new.png"]})
    patch = f"""
real, left = Path.replace, [{replace_number}]
def replace(self, target):
    if left[0] == 0: die()
    left[0] -= 1
    return real(self, target)
Path.replace = replace
"""
    run_killed(pets, patch)
    index = open_index(pets / "index")
    assert (index.fingerprint, len(index.splits["train"])) == (before, 7)
    again = build_index(pets)
    assert (again.fingerprint != before, len(again.splits["train"])) == (True, 8)
    for i in range(8):
        assert (
            xxhash.xxh3_64_intdigest(again.splits["train"].path(i).read_bytes())
            == again.splits["train"].records["digest"][i]
        )


def test_killed_scan_goes_on_where_it_was(tmp_path, monkeypatch):
    settings = Settings(classes=2, train_per_class=80, val_per_class=2, size=24, oddities=0, damaged=2)
    generate_tree(tmp_path / "set", settings)
    patch = """
real = scan.ScanJournal.add
def add(self, names, found):
    real(self, names, found)
    self.file.write(b'["half a line'); self.file.flush(); die()
scan.ScanJournal.add = add
"""
    run_killed(tmp_path / "set", patch)
    run_killed(tmp_path / "set", patch)
    read, inspect_all = [], scan_split.inspect_all
    monkeypatch.setattr(scan_split, "inspect_all", lambda paths: read.extend(paths) or inspect_all(paths))
    index = build_index(tmp_path / "set", processes=1)
    assert len(read) == 160 + 4 - 2 * scan_split.CHUNK
    assert len(index.splits["train"]) == 158
    assert len(read_unreadable(index.folder)["train"]) == 2
    assert not (index.folder / scan.JOURNAL).exists()
    assert build_index(tmp_path / "set", tmp_path / "fresh", 1).fingerprint == index.fingerprint


def test_two_at_once_scan_the_tree_once(pets, monkeypatch, capsys):
    read, inspect_all, inside, go = [], scan_split.inspect_all, threading.Event(), threading.Event()

    def slowly(paths):
        read.extend(paths)
        inside.set()
        assert go.wait(60)
        return inspect_all(paths)

    monkeypatch.setattr(scan_split, "inspect_all", slowly)
    real_flock = lock.fcntl.flock

    def flock(file, how):
        if not how & lock.fcntl.LOCK_NB:
            go.set()  # the second one has begun to wait
        real_flock(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(build_index, pets)
        assert inside.wait(60)
        second = pool.submit(build_index, pets)
        assert first.result(60).fingerprint == second.result(60).fingerprint
    assert len(read) == len(set(read)) == 10
    assert "another process is indexing; waiting for it" in capsys.readouterr().err


def test_a_failing_disk_is_not_taken_for_a_bad_image(pets, monkeypatch, capsys):
    def fail(path, *_):
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(decode, "open", fail, raising=False)
    with pytest.raises(TransientError, match=r"can't read .*Input/output error"):
        build_index(pets, processes=1)
    assert main(["index", str(pets), "--processes", "1"]) == 1


def test_opening_1_28_million_records_reads_next_to_nothing(tmp_path, monkeypatch):
    number = 1_281_167
    records = np.zeros(number, RECORD)
    records["label"] = np.arange(number) * 1000 // number
    records["digest"] = np.arange(number)
    names = [
        f"ILSVRC/Data/CLS-LOC/train/n{label:08d}/n{label:08d}_{i}.JPEG" for i, label in enumerate(records["label"])
    ]
    classes = [(f"n{label:08d}", f"class {label}") for label in range(1000)]
    write_index(tmp_path / "index", tmp_path, classes, {"train": (records, names)})
    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(os, "walk", None)
    times = []
    for _ in range(5):
        before = int(Path("/proc/self/io").read_text().split()[1])
        start = time.perf_counter()
        index = open_index(tmp_path / "index")
        times.append(time.perf_counter() - start)
        assert int(Path("/proc/self/io").read_text().split()[1]) - before < 500_000, "the whole index was read"
    print(f"opened {number:,} records in {1000 * min(times):.1f} ms")
    assert min(times) < 0.2
    assert index.splits["train"].name(number - 1) == names[-1]
    assert list(index.splits["train"].iter_names()) == names
