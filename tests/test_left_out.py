"""Nothing in a data root vanishes without a word: what an index leaves out is counted by reason and named."""

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
from test_index import damage, make_folder

from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.scan import build_index


@pytest.fixture
def pets(tmp_path):
    tree = {f"{split}/{kind}": ["1.png", "2.png", "3.png"] for split in ("train", "val") for kind in ("cat", "dog")}
    return make_folder(tmp_path / "pets", tree)


def counts(root: Path) -> dict[str, dict[str, int]]:
    left_out = build_index(root).left_out
    return {split: {reason: n["count"] for reason, n in reasons.items()} for split, reasons in left_out.items()}


def test_a_clean_tree_leaves_nothing_out(pets, capsys):
    assert main(["index", str(pets)]) == 0
    assert "left out" not in capsys.readouterr().out
    assert counts(pets) == {"train": {}, "val": {}}


def test_an_image_larger_than_an_index_can_say_is_left_out(pets, capsys):
    """Such as a stack of microscopy pictures; it ended the scan with a traceback, each time. It is not read."""
    os.truncate(pets / "train/cat/2.png", 5_000_000_000)
    assert main(["index", str(pets)]) == 0
    assert "left out of train: 1 unreadable (train/cat/2.png)" in capsys.readouterr().out
    assert read_unreadable(pets / "index")["train"][0]["reason"] == "4 GiB or larger"


def test_folders_inside_class_folders_are_named(pets, capsys):
    """ImageFolder reads them as part of the class: with a level more than is meant, classes were merged in silence."""
    make_folder(pets, {"train/cat/images": ["4.png"]})  # as in Tiny-ImageNet
    assert main(["index", str(pets)]) == 0
    assert "folders inside" not in capsys.readouterr().out
    make_folder(pets, {"train/cat/siamese": ["5.png"], "train/cat/siamese/deep": ["6.png"]})
    assert main(["index", str(pets)]) == 0
    assert "1 class folder with folders inside: the images of cat/images and cat/siamese count as class cat;" in (
        capsys.readouterr().out
    )


def test_a_class_named_like_its_split_has_no_folders_inside(tmp_path, capsys):
    """As of CIFAR-100, where a class is called train."""
    tree = {f"{split}/{kind}": ["1.png"] for split in ("train", "val") for kind in ("bus", "car", "train", "val")}
    root = make_folder(tmp_path / "vehicles", tree)
    assert main(["index", str(root)]) == 0
    assert "folders inside" not in capsys.readouterr().out
    make_folder(root, {"train/train/steam": ["2.png"], "train/train/diesel": ["3.png"]})
    assert main(["index", str(root)]) == 0
    assert "the images of train/diesel and train/steam count as class train;" in capsys.readouterr().out


def test_a_pipe_and_a_device_among_the_images_are_left_out(pets, capsys):
    """The first waited for a writer without end; the second was read until the memory was full."""
    os.mkfifo(pets / "train/cat/pipe.png")
    (pets / "train/cat/zero.png").symlink_to("/dev/null")
    assert main(["index", str(pets)]) == 0
    assert "left out of train: 2 pipes or devices (train/cat/" in capsys.readouterr().out
    assert main(["verify", str(pets)]) == 0


LEFTOVERS = [
    *(".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", ".Trash-1000", "#recycle", ".snapshot", ".hidden"),
    *("$RECYCLE.BIN", "#snapshot", "~snapshot", "Network Trash Folder", "@Recently-Snapshot", ".zfs", ".AppleDouble"),
    *("Recycled", "FOUND.000", "@eadir", "LOST+FOUND"),
]


@pytest.mark.parametrize("name", LEFTOVERS)
@pytest.mark.parametrize("place", ["train", "train/cat", "val", "val/dog"])
def test_foreign_folders_are_no_classes_and_hold_no_images(pets, name, place, capsys):
    fingerprint = build_index(pets).fingerprint
    make_folder(pets, {f"{place}/{name}": ["copy.png"]})
    index = build_index(pets)
    assert index.fingerprint == fingerprint and index.synsets == ("cat", "dog")
    assert counts(pets)[place.partition("/")[0]] == {"foreign leftovers": 1}
    assert main(["index", str(pets)]) == 0
    assert f"1 foreign leftover ({place}/{name})" in capsys.readouterr().out


def test_foreign_files_are_no_images(pets):
    for name in ("._1.png", ".DS_Store", "Thumbs.db", ".hidden.jpg"):
        (pets / "train/cat" / name).write_bytes(b"Mac OS X")
    assert counts(pets) == {"train": {"foreign leftovers": 4}, "val": {}}


def test_files_with_other_suffixes_are_counted_by_suffix(pets, capsys):
    for name in ("a.jfif", "b.JFIF", "c.jpe", "d.jpeg2000", "e", "notes.txt"):
        (pets / "train/cat" / name).write_bytes((pets / "train/cat/1.png").read_bytes())
    assert main(["index", str(pets)]) == 0
    said = capsys.readouterr().out
    for part in ("2 with suffix .jfif", "1 with suffix .jpe ", "1 with suffix .jpeg2000", "1 without suffix"):
        assert part in said


def test_a_class_of_other_suffixes_alone_is_an_error_that_names_them(pets, capsys):
    for path in (pets / "train/cat").iterdir():
        path.rename(path.with_suffix(".jfif"))
    assert main(["index", str(pets)]) == 2
    assert re.search(r"train/cat holds no image \(but entries 3 with suffix \.jfif\)", capsys.readouterr().err)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_that_is_a_dead_link_is_an_error(pets, split, capsys):
    (pets / split / "cat").rename(pets / "away")
    (pets / split / "cat").symlink_to("../nowhere/cat")
    assert main(["index", str(pets)]) == 2
    said = capsys.readouterr().err
    assert f"{split}/cat is a link to ../nowhere/cat, which is not there" in said


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_is_a_dead_link_is_an_error_that_names_the_target(pets, split, capsys):
    (pets / split).rename(pets / "away")
    (pets / split).symlink_to("/nowhere/split")
    assert main(["index", str(pets)]) == 2
    assert f"{split} is a link to /nowhere/split, which is not there" in capsys.readouterr().err


def test_verify_of_a_split_that_is_a_dead_link_is_an_error(pets, capsys):
    (pets / "val").rename(pets / "elsewhere")
    (pets / "val").symlink_to(pets / "gone")
    assert main(["verify", str(pets)]) == 2
    assert f"{pets}/val is a link to {pets}/gone, which is not there" in capsys.readouterr().err


def test_dead_links_to_images_are_counted_and_named(pets):
    (pets / "train/cat/4.png").symlink_to("/nowhere/4.png")
    (pets / "train/cat/more").symlink_to("/nowhere/more")
    assert counts(pets) == {"train": {"dead links": 2}, "val": {}}


def test_links_to_themselves_are_dead(pets, capsys):
    (pets / "train/cat/4.png").symlink_to("4.png")
    assert counts(pets)["train"] == {"dead links": 1}
    assert main(["verify", str(pets)]) == 2
    assert "missing: train/cat/4.png" in capsys.readouterr().out
    (pets / "train/cow").symlink_to("cow")
    assert main(["index", str(pets)]) == 2
    assert f"class folder {pets}/train/cow is a link to cow, which is not there" in capsys.readouterr().err


def test_a_link_to_a_folder_above_ends(pets):
    (pets / "train/cat/again").symlink_to("..", target_is_directory=True)
    index = build_index(pets)
    cats = [name for name in index.splits["train"].iter_names() if name.startswith("train/cat/")]
    assert "links to a folder above" in counts(pets)["train"]
    assert len(cats) == len(index.splits["train"]) - 3  # the link brings in the other class's images, once
    assert len(set(cats)) == len(cats) <= 6


def test_a_mended_file_is_taken_when_index_runs_again(pets):
    whole = (pets / "train/cat/1.png").read_bytes()
    damage(pets / "train/cat/1.png")
    assert counts(pets)["train"] == {"unreadable": 1}
    (pets / "train/cat/1.png").write_bytes(whole)  # in place: its folder does not change
    assert main(["index", str(pets)]) == 0
    assert counts(pets) == {"train": {}, "val": {}}
    assert len(open_index(pets / "index").splits["train"]) == 6


def test_stray_images_beside_class_folders_are_counted(pets):
    make_folder(pets, {"train": ["overview.png"]})
    assert counts(pets) == {"train": {"images beside the class folders": 1}, "val": {}}


def test_an_index_of_an_older_version_leaves_nothing_out(pets):
    folder = build_index(pets).folder
    meta = json.loads((folder / "index.json").read_text())
    del meta["left_out"]
    (folder / "index.json").write_text(json.dumps(meta))
    assert open_index(folder).left_out == {}


def test_names_in_nfc_and_nfd_are_told_apart(pets, capsys):
    name = "caf\u00e9"
    make_folder(pets, {f"train/{unicodedata.normalize('NFC', name)}": ["1.png"]})
    make_folder(pets, {f"val/{unicodedata.normalize('NFD', name)}": ["1.png"]})
    assert main(["index", str(pets)]) == 2
    said = capsys.readouterr().err
    assert "NFD ('cafe\\u0301')" in said and "NFC ('caf\\xe9')" in said
    decomposed = unicodedata.normalize("NFD", name)
    (pets / "val" / decomposed).rename(pets / "train" / decomposed)
    assert main(["index", str(pets)]) == 2
    assert "is another name" in capsys.readouterr().err


def test_each_name_of_a_class_is_looked_at_once(pets, monkeypatch):
    """Names beyond ASCII were compared with all others: half an hour for 100,000 classes."""
    make_folder(pets, {f"{split}/类别{number}": ["1.png"] for split in ("train", "val") for number in range(40)})
    normalize, seen = unicodedata.normalize, []
    monkeypatch.setattr(unicodedata, "normalize", lambda form, name: seen.append(name) or normalize(form, name))
    assert build_index(pets).num_classes == 42
    assert len(seen) <= 2 * 42
