"""Tar files of others, read in place: WebDataset shards in every usual form, and image-net.org's own files."""

import random
import shutil
import tarfile
from pathlib import Path

import pytest
import runs
import webdataset
from test_layouts import (
    KIT,
    SYNSETS,
    expected,  # noqa: F401 - a fixture
    flat_val,
    index_of,
    jpeg,
    kit_files,
    make_tar,
    official_tars,
    train_images,
    val_images,
    write,
)

from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.left_out import Tally
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.index.tar_listing import TarSplit, drop_unlabeled, name_classes
from pipeline.dataset.index.tar_members import Member
from pipeline.errors import UserError

NUMBER = {synset: number for number, synset in enumerate(sorted(SYNSETS.values()))}


def samples(split: str) -> list[tuple[str, str, bytes]]:
    """(key, class, image), shuffled."""
    if split == "train":
        found = [
            (name.partition("/")[2][:-5], name.partition("/")[0], data) for name, data in sorted(train_images().items())
        ]
    else:
        found = [(name[:-5], synset, data) for name, (synset, data) in sorted(val_images().items())]
    random.Random(0).shuffle(found)
    return found


def label_members(form: str, key: str, synset: str) -> dict[str, object]:
    number = NUMBER[synset]
    return {
        "cls": {"cls": number},
        "json": {"json": {"label": number, "width": 32, "filename": f"{key}.JPEG"}},
        "both": {"cls": number, "json": {"label": number}},
        "synset in json": {"json": {"class_id": number, "wnid": synset, "text": "kit fox"}},
        "text": {"cls.txt": synset.encode()},
    }[form]


def write_shards(root: Path, form: str, names: tuple[str, str], image: str = "jpg") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, pattern in zip(("train", "val"), names, strict=True):
        (root / pattern).parent.mkdir(parents=True, exist_ok=True)
        with webdataset.ShardWriter(str(root / pattern), maxcount=4, verbose=0) as sink:
            for key, synset, data in samples(split):
                sink.write({"__key__": key, image: data, **label_members(form, key, synset)})
    return root


TIMM = ("imagenet1k-train-%04d.tar", "imagenet1k-validation-%02d.tar")


@pytest.mark.parametrize("form", ["cls", "json", "both", "synset in json", "text"])
@pytest.mark.parametrize("names", [TIMM, ("train/%05d.tar", "val/%05d.tar"), ("training-%d.tar", "test-%d.tar")])
def test_webdataset_shards_are_indexed_in_place(tmp_path, expected, form, names):  # noqa: F811
    root = write_shards(tmp_path / "wds", form, names)
    before = {path: path.read_bytes() for path in root.rglob("*.tar")}
    index = index_of(root)
    assert index.fingerprint == expected and not index.left_out["train"]
    assert before == {path: path.read_bytes() for path in root.rglob("*.tar")}
    assert main(["verify", str(root)]) == 0


def test_members_in_any_order_with_folders_in_keys(tmp_path, expected):  # noqa: F811
    root = tmp_path / "wds"
    for split in ("train", "val"):
        members: dict[str, bytes] = {}
        for key, synset, data in samples(split):
            members[f"./part/{key}.cls"] = f"{NUMBER[synset]}\n".encode()
            members[f"./part/{key}.JPEG"] = data
            members[f"./part/._{key}.JPEG"] = b"resource fork"
        shuffled = list(members.items())
        random.Random(1).shuffle(shuffled)
        write(root / f"{split}-0.tar", make_tar(dict(shuffled)))
    index = index_of(root)
    assert index.fingerprint == expected
    assert index.left_out["train"]["foreign leftovers"]["count"] == 9


def test_numbers_without_synsets_keep_their_order(tmp_path):
    for split in ("train", "val"):
        with webdataset.TarWriter(str(tmp_path / f"{split}.tar")) as sink:
            for number in range(12):
                sink.write({"__key__": f"{number % 3:06d}{number}", "jpg": jpeg(number), "cls": number})
    index = index_of(tmp_path)
    assert index.synsets == tuple(f"{number:02d}" for number in range(12))
    train = index.splits["train"]
    assert [train.read(i) for i in range(12)] == [jpeg(number) for number in range(12)]


@pytest.mark.parametrize(
    "members",
    [
        {"json": b'\xef\xbb\xbf{"label": %d}'},
        {"json": b'{"label": %d.0}'},
        {"json": b'{"label": [%d]}'},
        {"json": b'{"caption": "a", "category_id": %d}'},
        {"cls": b"\xef\xbb\xbf%d\r\n"},
        {"cls": b"%d\0"},
        {"CLS": b"%d.0"},
    ],
)
def test_labels_in_the_forms_that_writers_give_them(tmp_path, members):
    """A negative number is no label."""
    for split in ("train", "val"):
        found = {f"{i}.{kind}": text % (i % 2) for i in range(4) for kind, text in members.items()}
        found |= {f"{i}.JPG": jpeg(i) for i in range(5)} | {f"4.{kind}": text % -1 for kind, text in members.items()}
        write(tmp_path / f"{split}-0.TAR", make_tar(found))
    index = index_of(tmp_path)
    assert index.synsets == ("0", "1") and index.splits["train"].records["label"].tolist() == [0, 0, 1, 1]
    assert index.left_out["train"]["samples without a label"]["count"] == 1


def test_an_empty_label_is_none(tmp_path):
    members = [(0, Member("a.jpg", 0, 9, "", "", "")), (0, Member("b.jpg", 9, 9, "cat", "", ""))]
    split = TarSplit((tmp_path / "train.tar",), members, Tally(), {})
    with pytest.raises(UserError, match="a label is '', which can't be the name of a class"):
        name_classes({"train": split})
    drop_unlabeled(split, tmp_path)
    assert [member.name for _, member in split.members] == ["b.jpg"]
    assert split.left_out.reasons == {"samples without a label": {"count": 1, "first": "train.tar:a.jpg"}}


def test_leftovers_beside_shards_are_passed_over(tmp_path, expected):  # noqa: F811
    root = write_shards(tmp_path / "wds", "cls", ("train/%d.tar", "val/%d.tar"))
    (root / "train/@eaDir").mkdir()
    write(root / "train/._0.tar", b"resource fork")
    assert index_of(root).fingerprint == expected


def test_the_same_key_in_every_shard(tmp_path, capsys):
    for split in ("train", "val"):
        for shard in range(3):
            with webdataset.TarWriter(str(tmp_path / f"{split}-{shard}.tar")) as sink:
                for number in range(2):
                    sink.write({"__key__": f"{number:06d}", "jpg": jpeg(10 * shard + number), "cls": number})
    index = index_of(tmp_path)
    assert len(set(index.splits["train"].iter_names())) == 6
    assert main(["pack", str(tmp_path), str(tmp_path / "out")]) == 0
    packed = open_index(tmp_path / "out/index")
    assert packed.fingerprint == index.fingerprint
    with tarfile.open(tmp_path / "out" / packed.splits["train"].shards[0]) as tar:
        assert len(set(tar.getnames())) == 12


def test_what_a_shard_holds_besides_is_counted(tmp_path, capsys):
    members = {"a.jpg": jpeg(1), "a.cls": b"0", "b.jpg": jpeg(2), "c.cls": b"1", "d.jpg": jpeg(3)[:-200], "d.cls": b"0"}
    members |= {"e.jpg": jpeg(4), "e.right.jpg": jpeg(5), "e.cls": b"1"}
    for split in ("train", "val"):
        write(tmp_path / f"{split}-0.tar", make_tar(members))
    said = (main(["index", str(tmp_path)]), capsys.readouterr().out)[1]
    for reason in ("1 sample without a label", "1 sample without an image", "1 further image of", "1 unreadable"):
        assert reason in said, said
    assert "without an image (train-0.tar:c.cls)" in said
    (entry,) = read_unreadable(tmp_path / "index")["train"]
    assert entry["file"] == "train-0.tar:d.jpg"
    assert main(["verify", str(tmp_path)]) == 2
    assert "damaged: train-0.tar:d.jpg: does not decode" in capsys.readouterr().out
    shutil.move(tmp_path / "index", tmp_path / "kept")
    assert main(["verify", str(tmp_path)]) == 2
    assert "damaged: train-0.tar:d.jpg: does not decode" in capsys.readouterr().out
    shutil.move(tmp_path / "kept", tmp_path / "index")
    assert main(["pack", str(tmp_path), str(tmp_path / "out"), "--unreadable", "reencode"]) == 0
    train = open_index(tmp_path / "out/index").splits["train"]
    assert list(train.iter_names()) == ["0/a.jpg", "0/d.jpg", "1/e.jpg"]
    assert "train-0.tar:d.jpg: re-encoded" in capsys.readouterr().out


def test_verify_of_a_changed_tar_goes_by_names(tmp_path, capsys):
    """A tar that was written again in another order is as good; lost, changed and new members are said."""
    members = {
        f"{i}.{kind}": jpeg(i) if kind == "jpg" else str(i % 2).encode() for i in range(6) for kind in ("jpg", "cls")
    }
    for split in ("train", "val"):
        write(tmp_path / f"{split}.tar", make_tar(members))
    index_of(tmp_path)
    turned = dict(reversed(members.items()))
    write(tmp_path / "train.tar", make_tar(turned))
    assert main(["verify", str(tmp_path)]) == 0
    del turned["2.jpg"]
    write(tmp_path / "train.tar", make_tar(turned | {"4.jpg": jpeg(9), "7.jpg": jpeg(7)[:-200], "7.cls": b"1"}))
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    for line in ("missing: 2.jpg", "4.jpg: bytes differ", "train.tar:7.jpg: does not decode"):
        assert line in said, said


def test_verify_after_the_loss_of_a_tar_names_its_images_alone(tmp_path, capsys):
    for split in ("train", "val"):
        for shard in range(2):
            members = {f"{i}.jpg": jpeg(10 * shard + i) for i in range(3)} | {f"{i}.cls": b"0" for i in range(3)}
            write(tmp_path / f"{split}-{shard}.tar", make_tar(members))
    index_of(tmp_path)
    (tmp_path / "train-1.tar").unlink()
    (tmp_path / "val-1.tar").rename(tmp_path / "kept")
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 2
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing: ")]
    lost = [f"missing: {split}-1.tar/{i}.jpg" for split in ("train", "val") for i in range(3)]
    assert sorted(missing) == lost
    index_of(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "val-1.tar")
    assert main(["verify", str(tmp_path)]) == 0


def test_a_changed_shard_is_read_again_and_the_others_are_not(tmp_path, monkeypatch):
    root = write_shards(tmp_path / "wds", "cls", TIMM)
    first = index_of(root)
    assert build_index(root).splits["train"].records.filename == first.splits["train"].records.filename
    read: list[str] = []
    with webdataset.TarWriter(str(root / "imagenet1k-train-0001.tar")) as sink:
        sink.write({"__key__": f"{SYNSETS[1]}_99", "jpg": jpeg(77), "cls": NUMBER[SYNSETS[1]]})
    from pipeline.dataset.index import decode

    real = decode.read_member

    def spy(member):
        read.append(Path(member[0]).name)
        return real(member)

    monkeypatch.setattr(decode, "read_member", spy)
    assert len(build_index(root).splits["train"]) == 6
    assert read == ["imagenet1k-train-0001.tar"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("../x.jpg", "archive refused"), ("/x.jpg", "archive refused"), ("x.jpg", "images without labels")],
)
def test_shards_that_will_not_do_are_one_line(tmp_path, capsys, name, says):
    write(tmp_path / "train-0.tar", make_tar({name: jpeg(0)}))
    write(tmp_path / "val-0.tar", make_tar({name: jpeg(0)}))
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (make_tar({"a.jpg": jpeg(0)}, "w:gz"), "is compressed (gzip)"),
        (b"PK\3\4" + bytes(600), "is compressed (zip)"),
        (b"\n<html>not found</html>" * 50, "holds a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        (make_tar({"a.jfif": jpeg(0), "a.cls": b"0"}), "holds no image (but .cls, .jfif)"),
    ],
)
def test_what_is_no_tar_of_images_is_named(tmp_path, capsys, data, says):
    for split in ("train", "val"):
        write(tmp_path / f"{split}-0.tar", data)
    assert main(["index", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/train-0.tar {says}" in error and len(error.splitlines()) == 1


def test_files_that_are_not_read_beside_shards_are_said(tmp_path, expected, capsys):  # noqa: F811
    root = write_shards(tmp_path / "wds", "cls", TIMM)
    (root / "imagenet1k-train-0001.tar").rename(tmp_path / "kept")
    index_of(root)
    assert f"{root} has no imagenet1k-train-0001.tar, but has those before and behind" in capsys.readouterr().err
    (tmp_path / "kept").rename(root / "imagenet1k-train-0001.tar")
    write(root / "imagenet1k-train-0003.tar.gz", b"")
    assert index_of(root).fingerprint == expected
    assert f"{root} also holds imagenet1k-train-0003.tar.gz: not read" in capsys.readouterr().err
    (root / "imagenet1k-train-0003.tar.gz").unlink()
    for suffix in ("md5", "sha256", "idx", "json"):
        write(root / f"imagenet1k-train-0000.tar.{suffix}", b"")
    index_of(root)
    assert "also holds" not in capsys.readouterr().err
    write(root / "imagenet1k-train-0000.tar.aria2", b"")
    (root / "imagenet1k-train-0001.tar").rename(root / "imagenet1k-train-0001.tar.zst.part")
    index_of(root)
    error = capsys.readouterr().err
    assert f"{root} has no imagenet1k-train-0001.tar, but has those before and behind" in error
    assert f"{root} also holds imagenet1k-train-0000.tar.aria2 and 1 more: not read" in error
    for path in root.glob("*train*"):
        path.unlink()
    assert main(["index", str(root)]) == 2
    assert "holds imagenet1k-validation-00.tar but no training images" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["in a member", "between members"])
def test_a_cut_shard_is_said(tmp_path, capsys, end):
    root = write_shards(tmp_path / "wds", "cls", TIMM)
    path = root / "imagenet1k-train-0000.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-2]
    size = last.offset if end == "between members" else last.offset_data + 100
    path.write_bytes(path.read_bytes()[:size])
    assert main(["index", str(root)]) == (0 if end == "between members" else 2)
    assert ("no end mark" if end == "between members" else "cut or damaged") in capsys.readouterr().err


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path, capsys):
    path = write_shards(tmp_path / "wds", "cls", TIMM) / "imagenet1k-train-0000.tar"
    with tarfile.open(path) as tar:
        at = tar.getmembers()[4].offset
    damage(path, at + 3)
    assert main(["index", str(path.parent)]) == 2
    error = capsys.readouterr().err
    assert f"{path} is cut or damaged (damaged header at byte {at:,})" in error and len(error.splitlines()) == 1


def test_an_official_tar_that_is_cut_between_its_images_is_not_whole(tmp_path, capsys):
    path = official_tars(tmp_path / "set") / "ILSVRC2012_img_val.tar"
    with tarfile.open(path) as tar:
        path.write_bytes(path.read_bytes()[: tar.getmembers()[-1].offset])
    assert main(["index", str(path.parent)]) == 2
    assert f"{path} is cut (it has no end mark)" in capsys.readouterr().err
    for argv, code in ((["--pack"], 2), ([], 1)):
        assert main(["fetch", str(tmp_path / f"dest{code}"), "--from", str(path.parent), *argv]) == code
        assert "no end mark" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"<html>", b"\x1f\x8bjunk", b""])
def test_a_damaged_development_kit_is_one_line(tmp_path, capsys, data):
    root = official_tars(tmp_path / "set")
    write(root / f"{KIT}.tar.gz", data)
    assert main(["index", str(root)]) == 2
    error = capsys.readouterr().err
    assert f"{KIT}.tar.gz can't be read" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("where", ["outer", "inner", "cut"])
def test_a_damaged_header_in_a_tar_of_tars(tmp_path, capsys, where):
    path = official_tars(tmp_path / "set") / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
        with tarfile.open(fileobj=tar.extractfile(second)) as inner:
            inside = second.offset_data + inner.getmembers()[1].offset
    if where == "cut":
        path.write_bytes(path.read_bytes()[: second.offset])
    else:
        damage(path, 3 + (second.offset if where == "outer" else inside))
    assert main(["index", str(path.parent)]) == 2
    error = capsys.readouterr().err
    says = {"outer": f"header at byte {second.offset:,}", "inner": f"header at byte {inside:,}", "cut": "no end mark"}
    assert f"{path} is cut or damaged" in error and says[where] in error and len(error.splitlines()) == 1
    if where != "cut":
        assert main(["fetch", str(tmp_path / "tree"), "--from", str(path.parent)]) == 1
        assert "damaged header at byte" in capsys.readouterr().err


def test_a_disk_that_fails_may_be_retried(tmp_path, capsys):
    root = write_shards(tmp_path / "wds", "cls", TIMM)
    path = root / "imagenet1k-train-0000.tar"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a read of its first byte is an input/output error
    assert main(["index", str(root)]) == 1
    error = capsys.readouterr().err
    assert "Input/output error" in error and "run the same command again" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("form", ["official", "train as class tars", "train unpacked"])
def test_the_files_of_image_net_org_in_place(tmp_path, expected, form):  # noqa: F811
    root = tmp_path / "set"
    if form == "official":
        official_tars(root)
    else:
        flat_val(root)
        for name, data in kit_files().items():
            write(root / name, data)
    if form == "train as class tars":
        shutil.rmtree(root / "train")
        with tarfile.open(official_tars(tmp_path / "o") / "ILSVRC2012_img_train.tar") as tar:
            for member in tar:
                write(root / "train" / member.name, tar.extractfile(member).read())
    elif form == "train unpacked":
        shutil.rmtree(root / "val")
        write(root / "ILSVRC2012_img_val.tar", make_tar({name: data for name, (_, data) in val_images().items()}))
    assert index_of(root).fingerprint == expected
    assert main(["verify", str(root)]) == 0


def test_the_official_val_tar_requires_its_kit(tmp_path, capsys):
    root = official_tars(tmp_path / "set")
    (root / f"{KIT}.tar.gz").unlink()
    assert main(["index", str(root)]) == 2
    assert "ILSVRC2012_devkit_t12" in capsys.readouterr().err


def test_pack_of_the_official_tars_is_pack_of_the_tree(tmp_path, expected):  # noqa: F811
    tree, tars = tmp_path / "expected", official_tars(tmp_path / "set")
    assert main(["pack", str(tree), str(tmp_path / "a")]) == 0
    assert main(["pack", str(tars), str(tmp_path / "b")]) == 0
    command = ["fetch", str(tmp_path / "c"), "--from", str(tars), "--pack"]
    assert main(command) == 0
    assert not list((tmp_path / "c/.fetch").glob("*index*"))
    for path in (tmp_path / "a").glob("*.tar"):
        for other in "bc":
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes()
    assert open_index(tmp_path / "b/index").fingerprint == open_index(tmp_path / "c/index").fingerprint == expected
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.tar")}
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("*.tar")}


def test_training_from_shards_of_others_is_training_from_the_tree(tmp_path, expected):  # noqa: F811
    root = write_shards(tmp_path / "wds", "cls", TIMM)
    made = []
    for data in (tmp_path / "expected", root):
        run = tmp_path / f"run-{data.name}"
        runs.call(data, run, "--train.global_batch_size", "4", "--schedule.epochs", "1")
        made.append(runs.repeatable(run))
    assert made[0] and made[0] == made[1]
