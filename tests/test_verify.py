"""Verification: what is missing, damaged, mislabeled or foreign is named; what is merely odd is not; repair mends."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from test_layouts import sorted_tree

from pipeline.__main__ import main
from pipeline.dataset import imagenet
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.index.write import write_index
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.synthetic.archive import write_kaggle_zip
from pipeline.dataset.synthetic.generate import MARKER
from pipeline.dataset.valprep import sort_val
from pipeline.dataset.verify import verify
from pipeline.dataset.verify.verify import verify_root
from pipeline.errors import UserError

CLS_LOC = "ILSVRC/Data/CLS-LOC"


@pytest.fixture(scope="module")
def whole(synthetic_root, tmp_path_factory) -> Path:
    """A sorted and indexed tree; never changed (copy it first)."""
    root = tmp_path_factory.mktemp("whole") / "set"
    shutil.copytree(synthetic_root, root)
    sort_val(root)
    build_index(root)
    return root


@pytest.fixture
def root(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "set")
    return tmp_path / "set"


def check(report, what: str):
    return next(check for check in report.checks if check.what == what)


def flip(path: Path) -> None:
    """Change one byte in place: neither the file's size nor its folder's time tells."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0x55]))


def names(found) -> list[str]:
    return sorted(named.name for named in found)


def test_a_whole_set_passes_with_exit_code_0(root, tmp_path, capsys):
    assert main(["verify", str(root), "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"train images +96 +96 +ok\nval images +24 +24 +ok", out)
    assert "complete and verified: every image that its lists name" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["good"] is True
    assert report["fingerprint"] == open_index(root / "index").fingerprint
    assert [report[key] for key in ("missing", "damaged", "unlisted", "mislabeled")] == [[], [], [], []]


def lose(path: Path) -> None:
    path.unlink()


def lose_class(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(("spoil", "number"), [(lose, 1), (lose_class, 24)])
def test_missing_images_are_named(root, tmp_path, capsys, spoil, number):
    path = root / CLS_LOC / "train/n99000001/n99000001_7.JPEG"
    spoil(path)
    assert main(["verify", str(root), "--json", str(tmp_path / "report.json")]) == 2
    out = capsys.readouterr().out
    assert f"missing: {CLS_LOC}/train/n99000001/n99000001" in out
    assert re.search(rf"missing +0 +{number} +WRONG", out)
    assert re.search(rf"train images +96 +{96 - number} +WRONG", out)
    assert out.splitlines()[-1] == f"{root}: NOT complete"
    listed = json.loads((tmp_path / "report.json").read_text())["missing"]
    assert len(listed) == number
    entry = {"split": "train", "file": str(path.relative_to(root)), "class": "n99000001", "problem": "missing"}
    assert entry in listed


def test_progress_counts_what_is_looked_at(root, monkeypatch):
    """More and fewer images than the index and the lists name, with an index and without."""
    shown = []
    real = verify.Progress

    def spy(*args, **options):
        shown.append(real(*args, **options))
        return shown[-1]

    monkeypatch.setattr(verify, "Progress", spy)
    folder = root / CLS_LOC / "train/n99000001"
    shutil.copy(folder / "n99000001_7.JPEG", folder / "n99000001_999.JPEG")
    truncate(folder / "n99000001_8.JPEG")
    (folder / "n99000001_9.JPEG").unlink()
    before = verify_root(root)
    verify_root(root, before=before)
    shutil.rmtree(root / "index")
    verify_root(root)
    assert [(progress.total, progress.count) for progress in shown] == [(121, 121), (2, 2), (120, 120)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_with_html(path: Path) -> None:
    path.write_bytes(b"<!doctype html>".ljust(path.stat().st_size))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (flip, "bytes differ from those indexed"),
        (truncate, r"has [\d,]+ bytes instead of [\d,]+"),
        (empty, "is empty"),
        (replace_with_html, "bytes differ from those indexed"),
    ],
)
@pytest.mark.parametrize("inner", ["train/n99000002/n99000002_3.JPEG", "val/*/ILSVRC2012_val_00000005.JPEG"])
def test_damaged_images_are_named(root, capsys, spoil, problem, inner):
    path = next((root / CLS_LOC).glob(inner))
    spoil(path)
    assert main(["verify", str(root)]) == 2
    assert re.search(rf"^damaged: {path.relative_to(root)}: {problem}$", capsys.readouterr().out, re.M)


def test_without_an_index_every_image_is_decoded_and_none_is_made(root):
    shutil.rmtree(root / "index")
    assert verify_root(root).good
    path = root / CLS_LOC / "train/n99000002/n99000002_3.JPEG"
    truncate(path)
    report = verify_root(root)
    assert names(report.damaged) == [str(path.relative_to(root))]
    assert report.damaged[0].problem.startswith("does not decode")
    assert not (root / "index").exists()


def test_what_the_index_left_out_as_unreadable_is_damaged(root):
    path = root / CLS_LOC / "train/n99000002/n99000002_3.JPEG"
    replace_with_html(path)
    shutil.rmtree(root / "index")
    build_index(root)
    report = verify_root(root)
    assert names(report.damaged) == [str(path.relative_to(root))]
    assert not report.missing
    assert not report.good


def test_images_that_no_list_names_and_wrong_labels(root):
    val = root / CLS_LOC / "val"
    folders = sorted(val.iterdir())
    moved = next(folders[0].iterdir()).rename(folders[1] / next(folders[0].iterdir()).name)
    shutil.copy(root / CLS_LOC / "train/n99000000/n99000000_1.JPEG", root / CLS_LOC / "train/n99000003/cat.JPEG")
    report = verify_root(root)
    assert not report.good
    assert names(report.unlisted) == [f"{CLS_LOC}/train/n99000003/cat.JPEG"]
    assert names(report.mislabeled) == [str(moved.relative_to(root))]
    assert report.mislabeled[0].problem == f"lies in {folders[1].name}, belongs to {folders[0].name}"
    assert check(report, "val images a class").found == "5 to 7"
    assert not report.missing


def test_oddities_are_counted_and_no_errors(root, monkeypatch):
    report = verify_root(root)
    assert report.good
    assert {kind: report.kinds[kind] for kind in ("png", "cmyk", "grayscale")} == {"png": 1, "cmyk": 4, "grayscale": 5}
    odd = next(p.stem for p in (root / CLS_LOC / "train").rglob("*") if p.is_file() and p.read_bytes()[1:4] == b"PNG")
    monkeypatch.setattr(imagenet, "KNOWN_PNG", frozenset({odd}))
    assert check(verify_root(root), "ImageNet's known PNG and CMYK files").found == "1"


def fetched(root: Path, selected: dict) -> None:
    (root / "fetch.json").write_text(json.dumps({"selected": selected, "complete": True}))


def test_of_a_part_only_what_was_asked_for_is_expected(root):
    keep = ["n99000001", "n99000003"]
    for split in ("train", "val"):
        for folder in (root / CLS_LOC / split).iterdir():
            if folder.name not in keep:
                shutil.rmtree(folder)
    shutil.rmtree(root / "index")
    assert len(verify_root(root).missing) == 2 * (24 + 6)
    fetched(root, {"train": keep, "val": keep})
    report = verify_root(root)
    assert report.good
    assert check(report, "train images").expected == "48"
    next((root / CLS_LOC / "val/n99000001").iterdir()).unlink()
    assert len(verify_root(root).missing) == 1


def test_of_one_split_the_other_is_not_expected(root):
    shutil.rmtree(root / CLS_LOC / "train")
    shutil.rmtree(root / "index")
    fetched(root, {"val": "all"})
    report = verify_root(root)
    assert report.good
    assert [c.what for c in report.checks if c.what.startswith("train")] == []


def test_a_flat_validation_set_is_as_good(synthetic_root):
    assert verify_root(synthetic_root).good


def test_the_real_set_is_known_by_its_counts(root, monkeypatch, capsys):
    for name, value in (("TRAIN_IMAGES", 96), ("VAL_IMAGES", 24), ("CLASSES", 4)):
        monkeypatch.setattr(imagenet, name, value)
    assert main(["verify", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("ImageNet (ILSVRC 2012), every image")
    for name in ("LOC_val_solution.csv", "LOC_train_solution.csv", "ILSVRC/ImageSets", "ILSVRC/Annotations"):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert verify_root(root).good, "a tree of all synsets without lists is measured by the official counts"
    next((root / CLS_LOC / "val/n99000001").iterdir()).unlink()
    build_index(root)
    report = verify_root(root)
    assert (check(report, "val images").expected, check(report, "val images").good) == ("24", False)


def test_a_set_without_lists_is_measured_by_its_index(root, tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(root / CLS_LOC, plain)
    build_index(plain)
    assert main(["verify", str(plain)]) == 0
    assert "there is no list to check completeness against" in capsys.readouterr().out
    next((plain / "val/n99000001").iterdir()).unlink()
    report = verify_root(plain)
    assert len(report.missing) == 1
    assert not report.good


def test_decode_decodes_what_the_digest_only_vouches_for(root):
    index = open_index(root / "index")
    path = index.splits["train"].path(5)
    path.write_bytes(b"not an image".ljust(path.stat().st_size))
    splits = {}
    for name, split in index.splits.items():
        splits[name] = np.array(split.records), list(split.iter_names())
    splits["train"][0]["digest"][5] = xxhash.xxh3_64_intdigest(path.read_bytes())
    classes = list(zip(index.synsets, index.words, strict=True))
    write_index(root / "index", root, classes, splits, folders=index.folders)
    assert verify_root(root).good
    report = verify_root(root, decode=True)
    assert [named.problem for named in report.damaged] == ["does not decode: no image, or of an unknown format"]


def test_a_damaged_index_or_list_is_one_line(root, capsys):
    flip(root / "ILSVRC/ImageSets/CLS-LOC/train_cls.txt")
    (root / "ILSVRC/ImageSets/CLS-LOC/train_cls.txt").write_text("n99000000_1 1\n")
    assert main(["verify", str(root)]) == 2
    assert "train_cls.txt: expected 'SYNSET/IMAGE NUMBER', got 'n99000000_1'" in capsys.readouterr().err
    flip(next((root / "index").glob("train-*.npy")))
    shutil.rmtree(root / "ILSVRC/ImageSets")
    assert main(["verify", str(root)]) == 2
    assert re.search(r"index \S+ is damaged \(its records were changed\)", capsys.readouterr().err)
    assert main(["verify", str(root / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.fixture
def packed(whole, tmp_path) -> Path:
    pack_tree(whole, tmp_path / "shards", Options(shard_mb=1))
    return tmp_path / "shards"


def test_packed_shards_are_verified_sample_by_sample(packed, capsys):
    assert verify_root(packed).good
    index = open_index(packed / "index")
    train = index.splits["train"]
    with train.path(9).open("r+b") as file:
        file.seek(int(train.records["offset"][9]) + 60)
        file.write(b"????")
    report = verify_root(packed)
    assert names(report.damaged) == [train.name(9)]
    assert main(["verify", str(packed), "--repair"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"remove train-000000\.tar and run the same pack command again", error)
    (packed / "train-000000.tar").unlink()
    assert len(verify_root(packed).missing) == 96


@pytest.mark.parametrize("where", ["header", "label's header", "label"])
def test_damage_around_an_image_of_a_shard_is_named(packed, where):
    """Training reads the index's labels; readers of tar files read these."""
    train = open_index(packed / "index").splits["train"]
    start, size = (int(train.records[key][9]) for key in ("offset", "size"))
    behind = start + -(-size // 512) * 512
    at = {"header": start - 512 + 100, "label's header": behind + 5, "label": behind + 512}[where]
    data = bytearray(train.path(9).read_bytes())
    assert where != "label" or data[at : at + 1] == str(train.records["label"][9])[:1].encode()
    data[at] ^= 1
    train.path(9).write_bytes(data)
    assert [(named.name, named.problem) for named in verify_root(packed).damaged] == [
        (train.name(9), "its headers or its label in the shard are damaged; the image is not")
    ]


def test_repacking_mends_a_removed_shard(packed, whole):
    (packed / "train-000000.tar").unlink()
    pack_tree(whole, packed, Options(shard_mb=1))
    assert verify_root(packed).good


def test_shards_packed_smaller_are_whole_too(whole, tmp_path):
    pack_tree(whole, tmp_path / "small", Options(short_side=48))
    assert verify_root(tmp_path / "small").good


@pytest.fixture
def fetched_root(synthetic_root, tmp_path) -> Path:
    """A tree brought by `fetch` from an archive on disk."""
    write_kaggle_zip(synthetic_root, tmp_path / "archive.zip")
    assert main(["fetch", str(tmp_path / "fetched"), "--from", str(tmp_path / "archive.zip")]) == 0
    return tmp_path / "fetched"


def test_repair_fetches_just_what_is_broken(fetched_root, synthetic_root, capsys, monkeypatch):
    def contents() -> dict[str, bytes]:
        return {str(p.relative_to(fetched_root)): p.read_bytes() for p in (fetched_root / CLS_LOC).rglob("*.JPEG")}

    before, fingerprint = contents(), open_index(fetched_root / "index").fingerprint
    assert verify_root(fetched_root).good
    flip(fetched_root / CLS_LOC / "train/n99000000/n99000000_4.JPEG")
    shutil.rmtree(fetched_root / CLS_LOC / "train/n99000001")
    truncate(next((fetched_root / CLS_LOC / "val/n99000002").iterdir()))
    next((fetched_root / CLS_LOC / "val/n99000003").iterdir()).unlink()
    counts: list[int] = []
    real: Callable = verify.check_items
    monkeypatch.setattr(
        verify, "check_items", lambda items, *rest: real((counts.append(1) or pair for pair in items), *rest)
    )
    assert main(["verify", str(fetched_root), "--repair"]) == 0
    assert contents() == before
    assert len(counts) == 96 + 24 + 27, "what was whole is not read a second time"
    assert "repairing 27 images" in capsys.readouterr().out
    assert open_index(fetched_root / "index").fingerprint == fingerprint
    assert verify_root(fetched_root).good


def test_repair_of_a_set_that_was_not_fetched_is_one_line(root, capsys):
    (root / CLS_LOC / "train/n99000001/n99000001_7.JPEG").unlink()
    assert main(["verify", str(root), "--repair"]) == 2
    assert "was not fetched" in capsys.readouterr().err.splitlines()[-1]


def test_a_report_that_cannot_be_written_is_one_line(whole, capsys):
    assert main(["verify", str(whole), "--json", str(whole / "no/such/folder.json")]) == 2
    assert "can't write" in capsys.readouterr().err


@pytest.mark.parametrize("inner", ["ILSVRC", "ILSVRC/Data", ".."])
def test_a_root_one_level_too_high_or_low_is_that_root(root, capsys, inner):
    assert main(["verify", str(root / inner)]) == 0
    assert f"{root}: complete and verified: every image that its lists name" in capsys.readouterr().out


def test_a_class_of_the_validation_split_alone_is_wrong(tmp_path, capsys):
    """Without lists and without an index, too."""
    root = sorted_tree(tmp_path / "set")
    (root / "val/n01440764").rename(root / "val/n88888888")
    assert main(["verify", str(root)]) == 2
    assert re.search(r"val classes that train lacks +0 +1 \(such as 'n88888888'\) +WRONG", capsys.readouterr().out)


def test_an_index_of_another_root_is_refused(root, tmp_path, capsys):
    other = shutil.copytree(root, tmp_path / "other")
    (next((other / CLS_LOC / "train").glob("*/*.JPEG"))).unlink()
    assert main(["verify", str(other), "--index", str(root / "index")]) == 2
    assert f"index {root}/index is of {root}, not of {other}" in capsys.readouterr().err


def test_verify_writes_nothing_into_the_root(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    verify_root(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert (root / MARKER).exists()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("LOC_val_solution.csv", b"", "names no image"),
        ("LOC_val_solution.csv", b"ImageId,PredictionString\n", "names no image"),
        ("ILSVRC/ImageSets/CLS-LOC/train_cls.txt", b"n01440764/n0\xb1440764_1 1\n", "not a text file"),
    ],
)
def test_lists_that_a_power_cut_or_a_disk_spoiled_are_one_line(root, capsys, name, data, says):
    (root / name).write_bytes(data)
    assert main(["verify", str(root)]) == 2
    assert re.search(
        rf"verify: \S+{Path(name).name}:? {says}.*; fetch the file again$", capsys.readouterr().err.strip()
    )


def test_unreadable_lists_stop_with_a_reason(root):
    (root / "fetch.json").write_text("{")
    with pytest.raises(UserError, match=r"fetch\.json can't be read"):
        verify_root(root)
