"""Every usual form of ImageNet on disk: read as it lies, or named in one line with the command to type."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from pipeline.__main__ import main
from pipeline.dataset.index.index import Index, open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.layouts.devkit import Devkit
from pipeline.dataset.layouts.mat_file import read_mat
from pipeline.dataset.valprep import sort_val

# ILSVRC ids 1 and 2 are not the first and second of the sorted synsets
SYNSETS = {1: "n02119789", 2: "n01440764", 3: "n02100735"}
TRUTH = (2, 1, 3, 1, 2, 3)
KIT = "ILSVRC2012_devkit_t12"


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def train_images() -> dict[str, bytes]:
    """CLASS/FILE -> bytes. Another character than the dot behind the numbers would change their order."""
    numbers = (7, 100, 1000)
    return {f"{name}/{name}_{numbers[i]}.JPEG": jpeg(10 * k + i) for k, name in SYNSETS.items() for i in range(3)}


def val_images() -> dict[str, tuple[str, bytes]]:
    """FILE -> (class, bytes)."""
    return {f"ILSVRC2012_val_{number:08d}.JPEG": (SYNSETS[k], jpeg(100 + number)) for number, k in enumerate(TRUTH, 1)}


def meta_mat(compressed: bool = True) -> bytes:
    fields = ("ILSVRC2012_ID", "WNID", "words", "num_children", "children")
    rows = np.zeros((len(SYNSETS) + 1, 1), [(field, "O") for field in fields])
    for i, (number, synset) in enumerate(SYNSETS.items()):
        rows[i, 0] = (float(number), synset, f"words of {synset}", 0.0, np.zeros(0))
    rows[-1, 0] = (4.0, "n00001740", "entity", 2.0, np.array([1.0, 2.0]))  # no leaf: the real file has 860 of them
    file = io.BytesIO()
    scipy.io.savemat(file, {"synsets": rows}, do_compression=compressed)
    return file.getvalue()


def kit_files() -> dict[str, bytes]:
    truth = "".join(f"{k}\n" for k in TRUTH).encode()
    return {f"{KIT}/data/ILSVRC2012_validation_ground_truth.txt": truth, f"{KIT}/data/meta.mat": meta_mat()}


def make_tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sorted_tree(root: Path, train: str = "train", val: str = "val") -> Path:
    for name, data in train_images().items():
        write(root / train / name, data)
    for name, (synset, data) in val_images().items():
        write(root / val / synset / name, data)
    return root


def official_tars(root: Path) -> Path:
    inner: dict[str, dict[str, bytes]] = {}
    for name, data in train_images().items():
        synset, _, file = name.partition("/")
        inner.setdefault(synset, {})[file] = data
    write(
        root / "ILSVRC2012_img_train.tar", make_tar({f"{name}.tar": make_tar(files) for name, files in inner.items()})
    )
    write(root / "ILSVRC2012_img_val.tar", make_tar({name: data for name, (_, data) in val_images().items()}))
    write(root / f"{KIT}.tar.gz", make_tar(kit_files(), "w:gz"))
    return root


def flat_val(root: Path, inside: str = "") -> Path:
    sorted_tree(root, val="sorted")
    for name, (_, data) in val_images().items():
        write(root / "val" / inside / name, data)
    return root


@pytest.fixture
def expected(tmp_path: Path) -> str:
    """The fingerprint of the same images in class folders."""
    return build_index(sorted_tree(tmp_path / "expected")).fingerprint


def index_of(root: Path) -> Index:
    assert main(["index", str(root)]) == 0
    return open_index(root / "index")


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_train_and_any_name_of_val(tmp_path, expected, val):
    assert index_of(sorted_tree(tmp_path / "set", val=val)).fingerprint == expected


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [
        ("Train", "Val", "holds no train/ folder; if Train/ is meant, rename it: mv {root}/Train {root}/train"),
        ("ILSVRC2012_img_train", "val", "if ILSVRC2012_img_train/ is meant, rename it"),
        ("train", "val_set", "neither val/ nor test/; if val_set/ is meant, rename it: mv {root}/val_set {root}/val"),
        ("my train", "val", "rename it: mv '{root}/my train' {root}/train"),
        ("train", "carnival", "neither val/ nor test/; put the validation images into val/"),
    ],
)
def test_a_split_of_another_name_is_named(tmp_path, capsys, train, val, says):
    root = sorted_tree(tmp_path / "set", train, val)
    assert main(["index", str(root)]) == 2
    assert says.format(root=root) in capsys.readouterr().err


@pytest.mark.parametrize("name", ["LOC_val_solution.csv", "val/val_annotations.txt"])
def test_lists_with_a_byte_order_mark_and_windows_lines(tmp_path, expected, name):
    """As spreadsheets and editors save them. Without a head line the mark stands before an image."""
    root = flat_val(tmp_path / "set")
    row = "{},{} 1 2 3 4" if name.endswith("csv") else "{}.JPEG\t{}\t0\t0\t1\t1"
    lines = [row.format(file[:-5], synset) for file, (synset, _) in val_images().items()]
    write(root / name, "\ufeff" + "\r\n".join(lines))
    write(root / "LOC_synset_mapping.txt", f"\ufeff{SYNSETS[2]} tench\r\n")
    index = index_of(root)
    assert index.fingerprint == expected and index.words[0] == "tench"


def test_fetch_from_a_tree_says_to_index_it(tmp_path, capsys):
    assert main(["fetch", str(tmp_path / "dest"), "--from", str(sorted_tree(tmp_path / "set"))]) == 2
    assert f"index the folder: pipeline index {tmp_path}/set" in capsys.readouterr().err


def test_two_validation_folders_are_said(tmp_path, expected, capsys):
    root = sorted_tree(sorted_tree(tmp_path / "set"), val="valid")
    assert index_of(root).fingerprint == expected
    assert f"{root} holds val/ and valid/: taking val/" in capsys.readouterr().err


@pytest.mark.parametrize("compressed", [True, False])
def test_meta_mat_is_read_as_scipy_reads_it(compressed):
    data = meta_mat(compressed)
    theirs = scipy.io.loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
    ours = read_mat(data)["synsets"]
    assert [(int(row["ILSVRC2012_ID"][0]), row["WNID"], row["words"]) for row in ours] == [
        (int(row["ILSVRC2012_ID"]), row["WNID"], row["words"]) for row in theirs
    ]
    with pytest.raises(ValueError, match="MAT file"):
        read_mat(data[: len(data) // 2])


def test_a_later_kit_maps_ids_by_its_text_list():
    lines = "".join(f"{synset} {number} some_words\n" for number, synset in SYNSETS.items())
    kit = Devkit(Path("kit"), {"map_clsloc.txt": lines.encode(), "ILSVRC2012_validation_ground_truth.txt": b"3\n1\n"})
    assert kit.read_labels() == {"ILSVRC2012_val_00000001": SYNSETS[3], "ILSVRC2012_val_00000002": SYNSETS[1]}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", ["", "ILSVRC2012_img_val"])
def test_flat_val_is_labelled_by_the_development_kit(tmp_path, expected, packed, inside):
    root = flat_val(tmp_path / "set", inside)
    if packed:
        write(root / f"{KIT}.tar.gz", make_tar(kit_files(), "w:gz"))
    else:
        for name, data in kit_files().items():
            write(root / name, data)
    assert index_of(root).fingerprint == expected
    assert sort_val(root).moved == len(TRUTH)
    assert sorted(path.name for path in (root / "val").iterdir()) == sorted(SYNSETS.values())
    assert index_of(root).fingerprint == expected


def test_official_tars_make_a_tree_and_a_second_run_writes_nothing(tmp_path, expected, capsys):
    source, dest = official_tars(tmp_path / "official"), tmp_path / "dest"
    command = ["fetch", str(dest), "--from", str(source)]
    assert main(command) == 0
    assert "complete and verified: 9 train and 6 val images" in capsys.readouterr().out
    assert open_index(dest / "index").fingerprint == expected
    images = {path: path.stat().st_mtime_ns for path in dest.rglob("*.JPEG")}
    assert main(command) == 0
    assert images == {path: path.stat().st_mtime_ns for path in dest.rglob("*.JPEG")}
    lost = next(iter(images))
    lost.unlink()
    assert main(command) == 0
    assert lost.is_file()
    assert main(["verify", str(dest)]) == 0


def test_one_official_tar_after_the_other(tmp_path, expected, capsys):
    source, dest = official_tars(tmp_path / "official"), tmp_path / "dest"
    assert main(["fetch", str(dest), "--from", str(source / "ILSVRC2012_img_train.tar")]) == 0
    assert capsys.readouterr().out.strip().endswith("complete: 9 train images")
    assert main(["fetch", str(dest), "--from", str(source / "ILSVRC2012_img_val.tar")]) == 0
    assert index_of(dest).fingerprint == expected


def test_official_files_that_do_not_suffice_are_one_line(tmp_path, capsys):
    source, dest = official_tars(tmp_path / "official"), str(tmp_path / "dest")
    kit = source / f"{KIT}.tar.gz"
    assert main(["fetch", dest, "--from", str(kit)]) == 2
    assert "holds labels and no images" in capsys.readouterr().err
    assert main(["fetch", dest, "--from", str(source), "--classes", "1"]) == 2
    assert main(["fetch", dest, "--from", str(source), "--pack", "--split", "val"]) == 2
    assert "--pack requires both tar files" in capsys.readouterr().err
    assert main(["fetch", dest, "--from", str(source / "ILSVRC2012_img_train.tar"), "--pack"]) == 2
    assert "ILSVRC2012_img_val.tar is not there" in capsys.readouterr().err
    dest = str(tmp_path / "tree")
    write(kit, make_tar({name: data for name, data in kit_files().items() if "meta" not in name}, "w:gz"))
    assert main(["fetch", dest, "--from", str(source)]) == 2
    assert "meta.mat" in capsys.readouterr().err
    kit.unlink()
    assert main(["fetch", dest, "--from", str(source)]) == 2
    assert "put ILSVRC2012_devkit_t12.tar.gz of image-net.org into the same folder" in capsys.readouterr().err
    whole = (source / "ILSVRC2012_img_train.tar").read_bytes()
    write(source / "ILSVRC2012_img_train.tar", whole[: len(whole) // 2])
    assert main(["fetch", dest, "--from", str(source / "ILSVRC2012_img_train.tar")]) == 1
    assert "cut or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../n01440764.tar", "n01440764/x.tar", "evil.txt"])
def test_a_hostile_train_tar_is_refused(tmp_path, capsys, name):
    write(tmp_path / "ILSVRC2012_img_train.tar", make_tar({name: make_tar({"a.JPEG": jpeg(0)})}))
    assert main(["fetch", str(tmp_path / "dest"), "--from", str(tmp_path / "ILSVRC2012_img_train.tar")]) == 2
    assert "archive refused" in capsys.readouterr().err


def tiny_imagenet(root: Path) -> Path:
    for name, data in train_images().items():
        synset, _, file = name.partition("/")
        write(root / "train" / synset / "images" / file, data)
        write(root / "train" / synset / f"{synset}_boxes.txt", "x\t0\t0\t9\t9\n")
    rows = []
    for file, (synset, data) in val_images().items():
        write(root / "val/images" / file, data)
        rows.append(f"{file}\t{synset}\t0\t0\t9\t9\n")
    write(root / "val/val_annotations.txt", "".join(rows))
    write(root / "test/images/test_0.JPEG", jpeg(999))
    write(root / "words.txt", f"{SYNSETS[1]}\tkit fox\n")
    return root


def test_a_tiny_imagenet_image_of_two_classes_is_refused(tmp_path, capsys):
    root = tiny_imagenet(tmp_path / "tiny")
    with (root / "val/val_annotations.txt").open("a") as file:
        file.write(f"{min(val_images())}\tn09999999\t0\t0\t9\t9\n")
    assert main(["index", str(root)]) == 2
    assert f"{min(val_images())} is of n09999999, and of n" in capsys.readouterr().err


def test_tiny_imagenet_as_it_unpacks(tmp_path, expected):
    root = tiny_imagenet(tmp_path / "tiny")
    index = index_of(root)
    assert index.fingerprint == expected
    assert index.words[index.synsets.index(SYNSETS[1])] == "kit fox"
    assert main(["valprep", str(root)]) == 0
    assert not (root / "val/images").exists()
    assert index_of(root).fingerprint == expected


def test_imagenet_100_in_parts(tmp_path, expected):
    root = tmp_path / "set"
    for number, (name, data) in enumerate(sorted(train_images().items())):
        write(root / f"train.X{1 + number // 3}" / name, data)
    for name, (synset, data) in val_images().items():
        write(root / "val.X" / synset / name, data)
    write(root / "Labels.json", f'{{"{SYNSETS[1]}": "kit fox"}}')
    index = index_of(root)
    assert index.fingerprint == expected
    assert index.words[index.synsets.index(SYNSETS[1])] == "kit fox"
    write(root / "train.X3" / SYNSETS[1] / "new.JPEG", jpeg(7))
    assert len(index_of(root).splits["train"]) == 10


def test_numeric_class_folders_are_sorted_as_text(tmp_path):
    for split in ("train", "val"):
        for number in range(12):
            write(tmp_path / "set" / split / str(number) / "a.JPEG", jpeg(number))
    assert index_of(tmp_path / "set").synsets == tuple(sorted(map(str, range(12))))


@pytest.mark.parametrize(
    "given", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC", "ILSVRC/Data/CLS-LOC/train", ".."]
)
def test_a_root_too_high_or_too_low(tmp_path, expected, given, capsys):
    base = tmp_path / "up/kaggle"
    sorted_tree(base / "ILSVRC/Data/CLS-LOC")
    given_root = (base / given).resolve()
    assert build_index(given_root).fingerprint == expected
    note = "taking" in capsys.readouterr().err
    assert note == (given not in ("", "ILSVRC/Data/CLS-LOC"))
    assert not (base / "ILSVRC/Data/CLS-LOC/train/index").exists()


def test_leftovers_beside_a_data_set_are_no_second_one(tmp_path, expected):
    sorted_tree(tmp_path / "up/unzipped/set")
    sorted_tree(tmp_path / "up/__MACOSX/set")
    sorted_tree(tmp_path / "up/#recycle/set")
    assert build_index(tmp_path / "up").fingerprint == expected


def test_two_data_sets_below_are_named(tmp_path, capsys):
    sorted_tree(tmp_path / "both/one")
    sorted_tree(tmp_path / "both/two")
    assert main(["index", str(tmp_path / "both")]) == 2
    assert "holds 2 data sets (one, two); give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["data/train-00000-of-00294.parquet"], "Hugging Face parquet"),
        (["train/data-00000-of-00001.arrow"], "Hugging Face Arrow"),
        (["train-00000-of-01024", "validation-00000-of-00128"], "TFRecord"),
        (["train.beton"], "FFCV"),
        (["data.mdb"], "LMDB"),
        (["train.rec"], "RecordIO"),
        (["imagenet-object-localization-challenge.zip"], "pipeline fetch DEST --from"),
        (["imagenet-train-000000.tar", "imagenet-val-000000.tar"], "cut or damaged"),
        (["train/imagenet-0.tar.gz", "val/imagenet-0.tar.gz"], "unpack it"),
        (["ILSVRC2012_img_train.tar"], "put ILSVRC2012_img_val.tar beside it"),
        (["n01440764/a.JPEG", "n01443537/a.JPEG"], "class folders"),
        (["bullet train/a.JPEG", "car/a.JPEG"], "class folders (such as bullet train)"),
        (["train_set/a.JPEG", "val_set/a.JPEG"], "if train_set/ is meant, rename it"),
        (["train_set/cat/a.JPEG", "val_set/cat/a.JPEG", "samples/a.JPEG"], "if train_set/ is meant, rename it"),
        ([f"{name}/b/a.JPEG" for name in ("bullet train", *map(str, range(10)))], "expected train/CLASS/IMAGE"),
    ],
)
def test_other_forms_are_named_with_what_to_do(tmp_path, capsys, files, says):
    for name in files:
        write(tmp_path / "set" / name, b"x")
    assert main(["index", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1


def test_a_file_as_the_data_root_is_named(tmp_path, capsys):
    write(tmp_path / "ILSVRC2012_img_train.tar", b"x")
    assert main(["index", str(tmp_path / "ILSVRC2012_img_train.tar")]) == 2
    assert "official file of image-net.org" in capsys.readouterr().err
