"""The table "What you have, and what to type" of docs/dataset.md: each row is made, its command is run as it stands."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
from object_store import server  # noqa: F401 - a fixture
from parquet_sets import parquet  # noqa: F401 - a fixture
from test_layouts import (
    SYNSETS,
    expected,  # noqa: F401 - a fixture
    flat_val,
    jpeg,
    kit_files,
    official_tars,
    sorted_tree,
    tiny_imagenet,
    train_images,
    val_images,
    write,
)
from test_tar_layouts import TIMM, write_shards

from pipeline.__main__ import main
from pipeline.dataset.index.index import open_index

PAGE = Path(__file__).parents[1] / "docs/dataset.md"


def rows() -> list[tuple[str, str, str]]:
    """(what you have, what to type, then), as the page has them."""
    table = PAGE.read_text().partition("| you have | type | then |\n|---|---|---|\n")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [(have, type_.strip("`"), then) for have, type_, then in cells]


def kaggle_tree(root: Path, tmp_path: Path) -> None:
    base = root / "ILSVRC/Data/CLS-LOC"
    for name, data in train_images().items():
        write(base / "train" / name, data)
    solution = "ImageId,PredictionString\n"
    for name, (synset, data) in val_images().items():
        write(base / "val" / name, data)
        solution += f"{name[:-5]},{synset} 1 2 3 4 \n"
    write(root / "LOC_val_solution.csv", solution)
    write(root / "LOC_synset_mapping.txt", "".join(f"{name} words\n" for name in sorted(SYNSETS.values())))
    listed = "".join(f"{name[:-5]} {i}\n" for i, name in enumerate(sorted(train_images()), 1))
    write(root / "ILSVRC/ImageSets/CLS-LOC/train_cls.txt", listed)


def kaggle_zip_of(root: Path, tmp_path: Path) -> None:
    kaggle_tree(tmp_path / "kaggle", tmp_path)
    root.mkdir()
    with zipfile.ZipFile(root / "imagenet-object-localization-challenge.zip", "w") as archive:
        for path in sorted((tmp_path / "kaggle").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(tmp_path / "kaggle"))


def numeric(root: Path, tmp_path: Path) -> None:
    number = {synset: str(i) for i, synset in enumerate(sorted(SYNSETS.values()))}
    for name, data in train_images().items():
        synset, _, file = name.partition("/")
        write(root / "train" / number[synset] / file, data)
    for name, (synset, data) in val_images().items():
        write(root / "val" / number[synset] / name, data)


def imagenet_100(root: Path, tmp_path: Path) -> None:
    for number, (name, data) in enumerate(sorted(train_images().items())):
        write(root / f"train.X{1 + number // 3}" / name, data)
    for name, (synset, data) in val_images().items():
        write(root / "val.X" / synset / name, data)
    write(root / "Labels.json", "{}")


def unpacked(root: Path, tmp_path: Path) -> None:
    flat_val(root)
    for name, data in kit_files().items():
        write(root / name, data)


def inner(root: Path, tmp_path: Path) -> None:
    sorted_tree(root / "ILSVRC/Data/CLS-LOC")


#: Beginning of a row's first cell -> what makes ROOT. "the same" is the row above.
MAKERS = {
    "Kaggle's tree": kaggle_tree,
    "Kaggle's zip": kaggle_zip_of,
    "`train/CLASS/IMAGE`": lambda root, _: sorted_tree(root, val="valid"),
    "class folders named 0": numeric,
    "Tiny-ImageNet": lambda root, _: tiny_imagenet(root),
    "ImageNet-100": imagenet_100,
    "image-net.org's images unpacked": unpacked,
    "the same, `val/` to be sorted": unpacked,
    "image-net.org's own tar files": lambda root, _: official_tars(root),
    "the same, to be unpacked": lambda root, _: official_tars(root),
    "the same, as shards": lambda root, _: official_tars(root),
    "WebDataset shards of others": lambda root, _: write_shards(root, "cls", TIMM),
    "any of these": lambda root, _: sorted_tree(root),
    "a folder one level": inner,
}


def test_the_page_has_a_row_for_every_form():
    assert len(rows()) == 16
    known = (*MAKERS, "Hugging Face parquet", "shards in an object store")
    for have, _, _ in rows():
        assert any(have.startswith(start) for start in known), have


@pytest.mark.parametrize("number", range(len(rows())), ids=lambda i: re.sub(r"\W+", "-", rows()[i][0])[:40])
def test_a_row_is_true(tmp_path, expected, request, monkeypatch, number):  # noqa: F811
    have, command, then = rows()[number]
    root, dest = tmp_path / "root", tmp_path / "dest"
    if have.startswith("shards in an object store"):
        address = request.getfixturevalue("server")
        s3fs = pytest.importorskip("s3fs")
        assert main(["pack", str(tmp_path / "expected"), str(root)]) == 0
        for name, value in {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem(endpoint_url=address)
        files.mkdir("table-bucket")
        files.put(f"{root}/", "table-bucket/shards/", recursive=True)
        command = command.replace("BUCKET/SHARDS", "table-bucket/shards")
    elif have.startswith("Hugging Face parquet"):
        shutil.move(request.getfixturevalue("parquet"), root)
    else:
        next(make for start, make in MAKERS.items() if have.startswith(start))(root, tmp_path)
    argv = [word.replace("ROOT", str(root)).replace("DEST", str(dest)) for word in command.split()[1:]]
    assert main(argv) == 0
    if argv[0] == "valprep":
        assert main(["index", str(root)]) == 0
    made = dest if "from DEST" in then else root
    index = open_index(made / "index")
    assert [len(split) for split in index.splits.values()] == [9, 6]
    assert (index.fingerprint == expected) == (not have.startswith("class folders named 0"))
    assert jpeg(10) in {index.splits["train"].read(i) for i in range(9)}
