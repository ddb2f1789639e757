"""Hugging Face parquet files into shards: the bytes that the same images in folders give; resumed, refused."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from parquet_sets import parquet, write_table  # noqa: F401 - a fixture
from PIL import Image
from test_layouts import SYNSETS, expected, jpeg, sorted_tree, write  # noqa: F401 - a fixture

from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.tar_members import read_label
from pipeline.dataset.lock import locked
from pipeline.dataset.shards.parquet import pack as packing
from pipeline.dataset.shards.parquet import scan as parquet_scan

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
CUT = jpeg(5)[:-200]


def pack(source: Path, dest: Path, *argv: str) -> int:
    return main(["pack", str(source), str(dest), "--processes", "1", *argv])


def made_by(folder: Path) -> dict[str, bytes]:
    """The shards and their tables."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".restart")}
    assert found
    return found


def assert_same(packed: Path, tree: Path) -> None:
    assert made_by(packed) == made_by(tree)
    ours, theirs = open_index(packed / "index"), open_index(tree / "index")
    assert ours.fingerprint == theirs.fingerprint and not (packed / ".packing").exists()
    assert not list(packed.glob(".*.tmp"))
    for split, of_tree in theirs.splits.items():
        assert list(ours.splits[split].iter_names()) == list(of_tree.iter_names())


@pytest.mark.parametrize("argv", [[], ["--short-side", "16"], ["--restart", "4"], ["--unreadable", "reencode"]])
def test_the_shards_are_those_of_the_tree(tmp_path, parquet, expected, capsys, argv):  # noqa: F811
    if "--restart" in argv and shutil.which("jpegtran") is None:
        pytest.skip("jpegtran is not installed")
    packed, tree = tmp_path / "packed", tmp_path / "expected"
    blob = tmp_path / "blobs/0a1b"  # as the hub's cache keeps files
    blob.parent.mkdir()
    link = shutil.move(parquet / "data/train-00001-of-00002.parquet", blob)
    (parquet / "data/train-00001-of-00002.parquet").symlink_to(link)
    if "reencode" in argv:
        for name in ("n01440764_9", "n01440764_99"):
            write(tree / f"train/n01440764/{name}.JPEG", CUT)
        rows = [(f"n01440764_{i}_n01440764.JPEG", CUT, 0) for i in (9, 99)]
        write_table(parquet / "data/train-more.parquet", rows)
    assert pack(tree, tmp_path / "tree", *argv) == 0
    processes = () if argv else ("--processes", "2")
    assert pack(parquet, packed, *argv, *processes) == 0
    assert_same(packed, tmp_path / "tree")
    index = open_index(packed / "index")
    assert index.synsets == tuple(sorted(SYNSETS.values())) and index.words[0] == "words of n01440764, and more"
    if not argv:
        assert index.fingerprint == expected
    if "reencode" in argv:
        done = [note["done"] for note in read_unreadable(packed)["train"]]
        assert done == ["re-encoded"] * 2
    assert main(["verify", str(packed)]) == 0
    before = (packed / "train-000000.tar").stat().st_mtime_ns
    capsys.readouterr()
    assert pack(parquet, packed, *argv) == 0
    assert (packed / "train-000000.tar").stat().st_mtime_ns == before and not capsys.readouterr().err
    (packed / "val-000000.tar").unlink()
    assert pack(parquet, packed, *argv) == 0
    assert_same(packed, tmp_path / "tree")


def test_parts_and_an_index_elsewhere(tmp_path, parquet, expected):  # noqa: F811
    packed, learned = tmp_path / "packed", tmp_path / "learned"
    command = ["pack", str(parquet), str(packed), "--index", str(learned), "--processes", "1"]
    for part in ("2/2", "1/2"):
        assert main([*command, "--part", part]) == 0
        assert not (packed / "index").exists()
    assert main(command) == 0
    assert open_index(packed / "index").fingerprint == open_index(learned).fingerprint == expected


@pytest.mark.parametrize(
    ("held", "argv", "says"),
    [
        ({"lock": False}, ["--part", "1/2"], "packing into"),
        ({"lock": True, "part-1-of-2.lock": False}, [], "packing part 1/2 into"),
        ({"lock": True}, [], "packing into"),
        ({"lock": True, "part-1-of-2.lock": False}, ["--part", "1/2"], "packing part 1/2 into"),
        ({"lock": True, "part-1-of-2.lock": False}, ["--part", "1/3"], "packing part 1/2 into"),
        ({"lock": True, "part-1-of-2.lock": False}, ["--part", "2/2"], None),
    ],
)
def test_runs_whose_shards_overlap_exclude_each_other(tmp_path, parquet, capsys, held, argv, says):  # noqa: F811
    """held: locks of another process, and whether it shares them."""
    state = tmp_path / "packed/.packing"
    state.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        for name, shared in held.items():
            stack.enter_context(locked(state / name, "", shared=shared))
        assert pack(parquet, tmp_path / "packed", *argv) == (2 if says else 0)
    assert says is None or f"another process is {says} {tmp_path / 'packed'}" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["another time", "an older version's marker"])
def test_images_are_not_decoded_again_at_each_repeat(tmp_path, parquet, monkeypatch, change):  # noqa: F811
    packed = tmp_path / "packed"
    assert pack(parquet, packed) == 0
    marker = json.loads((packed / "pack.json").read_bytes())
    if change == "another time":
        os.utime(parquet / "data/train-00000-of-00002.parquet", ns=(0, 0))
    else:
        old = {name: size for name, (size, _) in marker[packing.MARK].items()}
        (packed / "pack.json").write_text(json.dumps(marker | {packing.MARK: old}))
    scanned = []
    real = packing.scan_parquet
    monkeypatch.setattr(packing, "scan_parquet", lambda *args: scanned.append(args) or real(*args))
    for _ in range(3):
        assert pack(parquet, packed) == 0
    assert len(scanned) == 1 and not (packed / ".packing").exists()


def test_room_for_the_originals_is_asked_for(tmp_path, parquet, capsys, monkeypatch):  # noqa: F811
    free = iter([10**12, 1000])  # for the shards, for the originals
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=next(free)))
    assert pack(parquet, tmp_path / "out", "--short-side", "16") == 2
    error = capsys.readouterr().err
    assert "has 0.000 GB free" in error and "(--part): the originals of all shards at work are written" in error


def test_an_image_name_of_just_too_many_bytes_names_its_row(tmp_path, parquet, capsys):  # noqa: F811
    """A tar header takes 100 bytes in one block; one more than with `.jpg` is found when the image is known."""
    name = "n" * (100 - len("n01440764/.jpg")) + "_n01440764.webp"
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "WEBP")
    write_table(parquet / "data/train-more.parquet", [(name, image.getvalue(), 0)])
    assert pack(parquet, tmp_path / "out") == 2
    assert "row 0 of data/train-more.parquet has too long an image name" in capsys.readouterr().err


def test_a_list_of_unreadable_images_from_an_older_version(tmp_path, parquet):  # noqa: F811
    write_table(parquet / "data/train-more.parquet", [("x_n01440764.JPEG", CUT, 0)])
    assert pack(parquet, tmp_path / "out") == 2
    noted = tmp_path / "out/.packing/source/unreadable.json"
    entries = json.loads(noted.read_bytes())
    for name in ("tar", "offset", "digest"):
        del entries["train"][0][name]
    noted.write_text(json.dumps(entries))
    assert pack(parquet, tmp_path / "out", "--unreadable", "skip") == 0


def test_a_source_that_vanishes_is_one_line(tmp_path, parquet, capsys, monkeypatch):  # noqa: F811
    path = parquet / "data/train-00001-of-00002.parquet"
    real = parquet_scan.scan_listings
    monkeypatch.setattr(parquet_scan, "scan_listings", lambda *args: path.unlink() or real(*args))
    assert pack(parquet, tmp_path / "out") == 2
    assert f"can't read {path} (No such file" in capsys.readouterr().err.splitlines()[-1]
    path.symlink_to("blobs/0a1b")
    assert pack(parquet, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and f"{path} is a link to blobs/0a1b, which is not there; download that file" in error[0]


def test_a_source_that_has_changed_is_told_by_its_whole_path(tmp_path, capsys):
    """Both splits have a file of the same name; the later one is no other source's."""
    for split in ("train", "validation"):
        write_table(tmp_path / f"hf/{split}/0000.parquet", [(f"{i}.jpg", jpeg(i), i % 2) for i in range(4)])
    command = ["pack", str(tmp_path / "hf"), str(tmp_path / "out"), "--processes", "1"]
    assert main(command) == 0
    write_table(tmp_path / "hf/train/0000.parquet", [(f"{i}.jpg", jpeg(i), i % 2) for i in range(5)])
    assert main(command) == 2
    assert "was packed with source" in capsys.readouterr().err


DYING = """
import os, signal, sys
from pipeline.__main__ import main
from pipeline.dataset.index import scan_journal
from pipeline.dataset.shards.parquet import pack as parquet

def dying(real, left=[int(sys.argv[2])]):
    def call(*args):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    return call

if sys.argv[1] == "scan":
    scan_journal.ScanJournal.add = dying(scan_journal.ScanJournal.add)
else:
    parquet.write_in_place = dying(parquet.write_in_place)
main(sys.argv[3:])
"""


def test_a_killed_pack_goes_on(tmp_path, monkeypatch):
    for split in ("train", "test"):
        rows = [(None, jpeg(i), i % 3) for i in range(30)]
        write_table(tmp_path / f"hf/{split}.parquet", rows, group=5)
    packed = tmp_path / "packed"
    command = ["pack", str(tmp_path / "hf"), str(packed), "--processes", "1"]
    for when, number in (("scan", "3"), ("write", "13")):
        killed = subprocess.run([sys.executable, "-c", DYING, when, number, *command], stderr=subprocess.DEVNULL)
        assert killed.returncode == -signal.SIGKILL
        assert not (packed / "train-000000.tar").exists()
        if when == "scan":
            journal = packed / ".packing/source/scan.journal"
            assert len(journal.read_text().splitlines()) == 10
    with (packed / ".val-000000.tar.tmp").open("r+b") as file:
        file.seek(700)
        file.write(b"damaged")
    looked, written = [], []
    real_look, real_write = parquet_scan._look_at, packing.write_in_place
    monkeypatch.setattr(parquet_scan, "_look_at", lambda places: looked.extend(places) or real_look(places))
    monkeypatch.setattr(packing, "write_in_place", lambda *args: written.append(args) or real_write(*args))
    opened, real_open = [], packing.open_file
    monkeypatch.setattr(packing, "open_file", lambda path: opened.append(path) or real_open(path))
    assert main(command) == 0
    assert not looked and len(written) == 60 - 12 + 1
    assert len(opened) <= 2 + 2 * 6  # each file, and each row group
    again = tmp_path / "again"
    assert pack(tmp_path / "hf", again) == 0
    assert_same(packed, again)
    assert open_index(again / "index").synsets == ("0", "1", "2")


@pytest.mark.parametrize("of_val", [("dog", "cat"), ("cat", "dog")])
def test_names_of_classes_where_no_synset_is_told(tmp_path, of_val):
    """Files whose lists of classes are in another order are joined by the names."""
    for split, names in (("train", ("dog", "cat")), ("valid", of_val)):
        rows = [(None, jpeg(i), names.index(("dog", "cat")[i % 2])) for i in range(4)]
        write_table(tmp_path / f"hf/{split}/0000.parquet", rows, names)
    assert pack(tmp_path / "hf", tmp_path / "out") == 0
    index = open_index(tmp_path / "out/index")
    assert index.synsets == ("cat", "dog")
    for split in index.splits.values():
        assert {split.read(i) for i in range(4) if split.records["label"][i] == 1} == {jpeg(0), jpeg(2)}


@pytest.mark.parametrize(
    ("of_val", "says"),
    [
        (("cat", "cat"), "gives two classes the same name"),
        (("dog",), "has the label 1, which its list of classes lacks"),
        (("dog", "cow"), "has the class 'cow' that"),
    ],
)
def test_lists_of_classes_that_do_not_fit_are_one_line(tmp_path, capsys, of_val, says):
    for split, names in (("train", ("dog", "cat")), ("valid", of_val)):
        write_table(tmp_path / f"hf/{split}.parquet", [(None, jpeg(i), i % 2) for i in range(4)], names)
    assert pack(tmp_path / "hf", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_labels_as_pandas_writes_them(tmp_path, capsys):
    """Floats, because one row has none; a class without a readable image is an error, as for a tree."""
    rows = [("a.jpg", jpeg(1), 0.0), ("b.jpg", jpeg(2), 1.0), ("c.jpg", jpeg(3), None)]
    for split in ("train", "val"):
        write_table(tmp_path / f"hf/{split}.parquet", rows)
    assert pack(tmp_path / "hf", tmp_path / "out") == 0
    index = open_index(tmp_path / "out/index")
    assert index.synsets == ("0", "1") and len(index.splits["train"]) == 2
    said = capsys.readouterr().err
    assert "left out of the shards: train: 1 sample without a label (train.parquet:c.jpg); val: 1 sample " in said
    write_table(tmp_path / "hf/train.parquet", [*rows, ("d.jpg", CUT, 2.0)])
    assert pack(tmp_path / "hf", tmp_path / "new") == 2
    assert "class '2' has no readable image" in capsys.readouterr().err


def test_labels_in_lists(tmp_path):
    """Of one element; several labels are none."""
    for split in ("train", "val"):
        rows = [(f"{i}.jpg", jpeg(i), [i % 2] if i < 4 else [0, 1]) for i in range(5)]
        write_table(tmp_path / f"hf/{split}.parquet", rows)
    assert pack(tmp_path / "hf", tmp_path / "out") == 0
    index = open_index(tmp_path / "out/index")
    assert index.synsets == ("0", "1") and len(index.splits["val"]) == 4


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (-1, None),
        (1.0, "1"),
        (-1.0, None),
        (1.5, None),
        (float("nan"), None),
        (float("inf"), None),
        ("-1", None),
        ("1.0", "1"),
        ("-1.0", None),
        ("", None),
        (" a ", "a"),
        ([3], "3"),
        ([3, 4], None),
        ([], None),
        (None, None),
        (True, None),
    ],
)
def test_a_label_is_the_same_in_a_tar_and_in_parquet(tmp_path, value, text):
    assert read_label({"json": json.dumps({"label": value}).encode()}) == (text, "")
    if isinstance(value, str):
        assert read_label({"cls": value.encode()}) == (text, "")
    write_table(tmp_path / "a.parquet", [("a.jpg", b"", value)])
    assert [member.label for member in parquet_scan._list_file(str(tmp_path / "a.parquet")).members] == [text]


@pytest.mark.parametrize("column", ["image.bytes", "image.path", "label"])
def test_a_damaged_page_is_one_line(tmp_path, parquet, capsys, column):  # noqa: F811
    path = parquet / "data/train-00001-of-00002.parquet"
    of_group = pq.ParquetFile(path).metadata.row_group(1)
    chunk = next(c for c in map(of_group.column, range(of_group.num_columns)) if c.path_in_schema == column)
    with path.open("r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * 24)
    assert pack(parquet, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{path} is damaged" in error and "download that file again" in error


def test_a_tree_with_a_parquet_file_beside_it_is_a_tree(tmp_path, expected, capsys):  # noqa: F811
    root = tmp_path / "expected"
    for name in ("train.parquet", "validation.parquet"):
        write_table(root / name, [(None, jpeg(1), 0)])
    assert pack(root, tmp_path / "out") == 0
    assert open_index(tmp_path / "out/index").fingerprint == expected
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("gone")
    assert pack(root, tmp_path / "new") == 2
    assert f"{root}/val is a link to gone, which is not there" in capsys.readouterr().err


def test_files_in_a_folder_below_and_names_that_do_not_tell(tmp_path, parquet, expected, capsys):  # noqa: F811
    above = tmp_path / "above"
    shutil.move(parquet, above / "imagenet-1k")
    assert pack(above, tmp_path / "out") == 0
    assert open_index(tmp_path / "out/index").fingerprint == expected
    data = above / "imagenet-1k/data"
    for path in data.glob("[vt][ae][ls]*.parquet"):
        path.unlink()
    capsys.readouterr()
    assert pack(above, tmp_path / "new") == 2
    assert "of the train split" in (error := capsys.readouterr().err) and "none of the validation split" in error
    for path in data.glob("train*.parquet"):
        write_table(path.with_name(path.name.replace("train", "validation")), [("a.jpg", jpeg(0), 0)])
    next(data.glob("train-00001*")).unlink()
    assert pack(above, tmp_path / "new") == 2
    assert "train-00001-of-00002.parquet is not there (1 of 2 files are missing)" in capsys.readouterr().err
    for path in data.glob("val*.parquet"):
        path.unlink()
    for number, path in enumerate(data.glob("train*.parquet")):
        path.rename(data / f"{number:04d}.parquet")
    assert pack(above, tmp_path / "new") == 2
    assert "whose names give no split" in capsys.readouterr().err


def test_what_will_not_do_is_one_line(tmp_path, parquet, capsys, monkeypatch):  # noqa: F811
    def says(*argv: str) -> str:
        assert pack(parquet, tmp_path / "out", *argv) == 2
        error = capsys.readouterr().err.strip()
        assert len([line for line in error.splitlines() if line.startswith("pipeline pack")]) == 1
        return error

    assert main(["index", str(parquet)]) == 2
    assert "pipeline pack" in capsys.readouterr().err
    write_table(parquet / "data/train-more.parquet", [("x_n01440764.JPEG", CUT, 0)])
    assert "1 image of" in says() and not (tmp_path / "out/pack.json").exists()
    assert pack(parquet, tmp_path / "out", "--unreadable", "skip") == 0
    assert open_index(tmp_path / "out/index").left_out["train"]["unreadable"]["count"] == 1
    pq.write_table(pa.table({"text": ["a"]}), parquet / "data/train-more.parquet")
    capsys.readouterr()
    assert "has the columns text" in says("--unreadable", "skip")
    (parquet / "data/train-more.parquet").write_bytes(b"PAR1 cut")
    assert "can't be read as parquet" in says("--unreadable", "skip")
    write(parquet / "data/train-more.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "run in its folder: git lfs pull" in says("--unreadable", "skip")
    without = tmp_path / "without/pyarrow.py"
    without.parent.mkdir()
    without.write_text("raise ImportError('No module named pyarrow')\n")
    paths = os.pathsep.join([str(without.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pipeline", "pack", str(parquet), str(tmp_path / "new")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install pyarrow" in done.stderr
