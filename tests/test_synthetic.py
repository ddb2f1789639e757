"""The made-up ImageNet: the archive's layout and lists, the real set's oddities, the same bytes, learnable classes."""

import csv
import io
import json
import re
import tarfile
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.__main__ import main
from pipeline.dataset.synthetic.archive import NESTED, write_kaggle_zip
from pipeline.dataset.synthetic.generate import MARKER, generate_tree, is_whole
from pipeline.dataset.synthetic.images import MAX_CLASSES, class_style
from pipeline.dataset.synthetic.plan import Settings, list_samples
from pipeline.errors import UserError

TINY = Settings(classes=3, train_per_class=4, val_per_class=2, size=48, oddities=8)
CLS_LOC = Path("ILSVRC/Data/CLS-LOC")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny") / "set"
    generate_tree(root, TINY)
    return root


def test_layout_and_lists_are_the_archives(tiny):
    names = contents(tiny)
    train = [n for n in names if re.fullmatch(r"ILSVRC/Data/CLS-LOC/train/(n\d{8})/\1_\d+\.JPEG", n)]
    val = [n for n in names if re.fullmatch(r"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_\d{8}\.JPEG", n)]
    assert (len(train), len(val)) == (12, 6)
    assert len(train) + len(val) == sum(n.endswith(".JPEG") for n in names)
    mapping = dict(line.split(" ", 1) for line in names["LOC_synset_mapping.txt"].decode().splitlines())
    assert list(mapping) == sorted({Path(n).parent.name for n in train})
    rows = list(csv.DictReader(io.StringIO(names["LOC_val_solution.csv"].decode())))
    assert sorted(row["ImageId"] for row in rows) == [Path(n).stem for n in val]
    labels = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    assert sorted(labels.values()) == sorted(list(mapping) * 2)
    for row in rows:
        words = row["PredictionString"].split()
        assert len(words) % 5 == 0
        assert row["PredictionString"].endswith(" ")
        note = ET.fromstring(names[f"ILSVRC/Annotations/CLS-LOC/val/{row['ImageId']}.xml"])
        assert (note.findtext("filename"), note.findtext("object/name")) == (row["ImageId"], words[0])
        box = [note.findtext(f"object/bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        assert box == words[1:5]
    listed = names["ILSVRC/ImageSets/CLS-LOC/train_cls.txt"].decode().splitlines()
    assert [f"ILSVRC/Data/CLS-LOC/train/{line.split()[0]}.JPEG" for line in listed] == train
    boxed = list(csv.DictReader(io.StringIO(names["LOC_train_solution.csv"].decode())))
    assert 0 < len(boxed) < len(train)


def test_same_settings_same_bytes_and_another_seed_other_pixels(tiny, tmp_path):
    generate_tree(tmp_path / "again", TINY)
    assert contents(tmp_path / "again") == contents(tiny)
    other = Settings(**{**json.loads((tiny / MARKER).read_text())["settings"], "seed": 1})
    generate_tree(tmp_path / "other", other)
    here, there = contents(tiny), contents(tmp_path / "other")
    assert not any(here[n] == there.get(n) for n in here if n.endswith(".JPEG"))


def test_number_of_processes_does_not_change_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.dataset.synthetic.generate.SMALL", 0)
    settings = Settings(classes=2, train_per_class=20, val_per_class=2, size=32, oddities=4)
    generate_tree(tmp_path / "one", settings, processes=1)
    generate_tree(tmp_path / "two", settings, processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_real_sets_oddities_are_there_and_decode(tiny):
    seen = set()
    for path in sorted((tiny / CLS_LOC / "train").rglob("*.JPEG")):
        with Image.open(path) as image:
            image.load()
            seen.add((image.format, image.mode))
            if image.getexif().get(0x0112) == 6:
                seen.add("rotated")
    assert seen == {("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), "rotated"}


def test_damaged_files_do_not_decode_and_no_other_is_hurt(tmp_path):
    settings = Settings(classes=2, train_per_class=8, val_per_class=0, size=32, oddities=4, damaged=4)
    generate_tree(tmp_path / "set", settings)
    bad = 0
    for path in (tmp_path / "set" / CLS_LOC / "train").rglob("*.JPEG"):
        try:
            with Image.open(path) as image:
                image.load()
        except OSError:
            bad += 1
    assert bad == 4


def test_sizes_and_bytes_are_spread_as_in_imagenet(tmp_path):
    settings = Settings(classes=4, train_per_class=25, val_per_class=0, oddities=0, mean_bytes=110_000)
    generate_tree(tmp_path / "set", settings)
    paths = sorted((tmp_path / "set" / CLS_LOC / "train").rglob("*.JPEG"))
    sizes = np.array([Image.open(path).size for path in paths])
    assert abs(sizes.mean(0) - (470, 400)).max() < 45
    assert len(np.unique(sizes, axis=0)) > 10
    assert abs(np.mean([path.stat().st_size for path in paths]) - 110_000) < 20_000


def test_mean_bytes_out_of_reach_is_one_line_with_the_range(tmp_path, capsys):
    assert main(["synth", str(tmp_path / "x"), "--size", "48", "--mean-bytes", "110000"]) == 2
    assert re.search(r"mean_bytes is 110000; at size 48 give \d+ to \d+", capsys.readouterr().err)


def test_classes_can_be_learned_from_pixels_but_not_from_one(synthetic_root):
    """Nearest class mean over small pictures: far above chance (25 %), and no picture is a flat fill."""

    def features(split):
        rows, labels = [], []
        for path in sorted((synthetic_root / CLS_LOC / split).rglob("*.JPEG")):
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB").resize((32, 32)), np.float32)
            assert pixels.std((0, 1)).min() > 8, f"{path} is nearly flat"
            chroma = pixels - pixels.mean(2, keepdims=True)
            rows.append(np.histogramdd(chroma.reshape(-1, 3), bins=5, range=[(-160, 160)] * 3)[0].ravel() ** 0.5)
            labels.append(path.stem)
        return np.array(rows), labels

    truth = {}
    for line in (synthetic_root / "LOC_val_solution.csv").read_text().splitlines()[1:]:
        name, words = line.split(",")
        truth[name] = words.split()[0]
    train, names = features("train")
    of = np.array([name.split("_")[0] for name in names])
    classes = np.unique(of)
    means = np.array([train[of == synset].mean(0) for synset in classes])
    val, names = features("val")
    found = classes[((val[:, None] - means) ** 2).sum(2).argmin(1)]
    assert np.mean([truth[name] == synset for name, synset in zip(names, found, strict=True)]) > 0.7


def test_a_thousand_classes_all_look_different():
    looks = {(look.shape, look.texture, look.hue, look.pitch) for look in map(class_style, range(MAX_CLASSES))}
    assert len(looks) == MAX_CLASSES >= 1000


def test_second_run_reuses_and_what_is_missing_is_made_again(tmp_path, capsys):
    argv = ["synth", str(tmp_path / "set"), "--classes", "2", "--train-per-class", "3", "--size", "32"]
    argv += ["--val-per-class", "1", "--oddities", "2"]
    assert main(argv) == 0
    before = contents(tmp_path / "set")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.JPEG")}
    capsys.readouterr()
    assert main(argv) == 0
    assert "generated earlier" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.JPEG")}
    next(iter(times)).unlink()
    assert main(argv) == 0
    assert "generated earlier" not in capsys.readouterr().out
    assert contents(tmp_path / "set") == before


def test_foreign_folder_and_other_settings_are_refused(tiny, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds something else"):
        generate_tree(tmp_path, TINY)
    with pytest.raises(UserError, match="seed 0 instead of 5"):
        generate_tree(tiny, Settings(**{**json.loads((tiny / MARKER).read_text())["settings"], "seed": 5}))
    assert is_whole(tiny, TINY)


@pytest.mark.parametrize("option", ["--classes=0", "--size=4", "--oddities=1000", "--seed=-1"])
def test_impossible_number_is_one_line(tmp_path, capsys, option):
    assert main(["synth", str(tmp_path / "x"), option]) == 2
    err = capsys.readouterr().err
    assert option[2:].split("=")[0] in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_kaggle_zip_holds_the_tree_under_the_archives_names(tiny, tmp_path):
    number = write_kaggle_zip(tiny, tmp_path / "a.zip", test_images=3)
    write_kaggle_zip(tiny, tmp_path / "b.zip", test_images=3)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    assert len(packed) == number
    tree = {name: data for name, data in contents(tiny).items() if name != MARKER}
    assert {name: packed[name] for name in tree} == tree
    extra = sorted(set(packed) - set(tree))
    assert extra[:3] == [f"{CLS_LOC}/test/ILSVRC2012_test_{i:08d}.JPEG" for i in (1, 2, 3)]
    assert extra[3:] == ["ILSVRC/ImageSets/CLS-LOC/test.txt", "LOC_sample_submission.csv"]


def test_nested_archive_holds_a_tar_gz_with_the_images(tiny, tmp_path):
    number = write_kaggle_zip(tiny, tmp_path / "a.zip", test_images=1, nested=True)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        top = archive.namelist()
        with archive.open(NESTED) as stream, tarfile.open(fileobj=stream, mode="r|gz") as tar:
            packed = {member.name: tar.extractfile(member).read() for member in tar}
    assert len(top) + len(packed) == number
    assert sorted(name for name in top if name != NESTED) == sorted(
        ["LOC_sample_submission.csv", "LOC_synset_mapping.txt", "LOC_train_solution.csv", "LOC_val_solution.csv"]
    )
    tree = {name: data for name, data in contents(tiny).items() if name.startswith("ILSVRC/")}
    assert {name: packed[name] for name in tree} == tree


def test_validation_labels_are_shuffled():
    labels = [sample.label for sample in list_samples(Settings(classes=5, val_per_class=20), "val")]
    assert labels != sorted(labels)
    assert np.bincount(labels).tolist() == [20] * 5
