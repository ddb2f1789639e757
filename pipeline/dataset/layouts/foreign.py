"""What a folder or file is that can't be trained from as it lies: said in one line, with the command to type."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from pipeline.dataset.names import is_folder, split_of
from pipeline.errors import UserError

_LOOKED_AT = 5000  # entries
_MANY = 10  # folders, above which they are classes, whatever the name of one
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def _to(pattern: str) -> Callable[[str], bool]:
    return re.compile(pattern, re.IGNORECASE).fullmatch  # type: ignore[return-value]


#: (does a file of this name belong to it?, what it is called, what to do; {root}: the folder, {file}: the file)
_FORMATS: list[tuple[Callable[[str], bool], str, str]] = [
    (
        _to(r".*\.parquet"),
        "Hugging Face parquet files",
        "make shards of them: pipeline pack {root} DEST",
    ),
    (
        _to(r".*\.arrow"),
        "Hugging Face Arrow files",
        "write each image into a folder of its class (train/CLASS/NAME.JPEG, val/CLASS/NAME.JPEG)",
    ),
    (
        _to(r"ILSVRC2012_img_(train|val)\.tar"),
        "an official file of image-net.org",
        "put both and ILSVRC2012_devkit_t12.tar.gz into one folder, then: pipeline fetch DEST --from FOLDER",
    ),
    (
        _to(r"ILSVRC20\d\d_devkit\w*\.(tar\.gz|tgz)"),
        "the official development kit of image-net.org, which holds no images",
        "put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar beside it and give the folder",
    ),
    (
        _to(r"imagenet[-_]object[-_]localization.*\.(zip|tar\.gz|tgz|tar)"),
        "Kaggle's archive",
        "unpack it: pipeline fetch DEST --from {file}",
    ),
    (
        _to(r"cifar-10-python\.tar\.gz|data_batch_[1-5]"),
        "CIFAR-10 as its authors give it",
        "make a tree of it: pipeline fetch cifar10 DEST --from cifar-10-python.tar.gz",
    ),
    (
        _to(r"(train|val)_data(_batch_\d+)?(\.npz)?"),
        "downsampled ImageNet in pickled batches",
        "write the images into train/CLASS/ and val/CLASS/ as PNG",
    ),
    (
        _to(r".*\.tfrecords?(\.gz)?|(train|validation|test)-\d{5}-of-\d{5}|.*\.tfrecord-\d{5}-of-\d{5}"),
        "TFRecord files",
        "write the images into train/CLASS/ and val/CLASS/, or into WebDataset tar files",
    ),
    (_to(r".*\.beton"), "FFCV files", "give the images that they were written from"),
    (_to(r"data\.mdb|.*\.lmdb"), "an LMDB database", "write the images into train/CLASS/ and val/CLASS/"),
    (_to(r".*\.rec"), "MXNet RecordIO files", "write the images into train/CLASS/ and val/CLASS/"),
    (_to(r".*\.(h5|hdf5)"), "HDF5 files", "write the images into train/CLASS/ and val/CLASS/"),
    (
        _to(r".*\.(zip|tar\.gz|tgz|tar\.zst|tar\.xz|7z|rar)"),
        "an archive",
        "unpack it (a tar file must not be compressed to be read in place) and give the folder",
    ),
    (
        _to(r".*\.tar"),
        "tar files whose names give no split",
        "name them train-*.tar and val-*.tar, or put them into train/ and val/",
    ),
]


def describe_file(path: Path) -> UserError:
    """What a file is that was given in place of a data root, and what to type."""
    for belongs, what, remedy in _FORMATS:
        if belongs(path.name):
            remedy = remedy.format(root=path.parent, file=path)
            return UserError(f"data root {path} is a file ({what}), not a folder; {remedy}")
    return UserError(f"data root {path} is a file, not a folder; give the folder that holds train/ and val/")


def describe_format(root: Path) -> UserError | None:
    """Which known format the files in a folder, or in the folders below it, have; None where they have none."""
    files, folders = _entries(root)
    inner = [path for folder in folders[:50] for path in _entries(folder)[0][:200]]
    for belongs, what, remedy in _FORMATS:
        found = next((path for path in [*files, *inner] if belongs(path.name)), None)
        if found is not None:
            return UserError(
                f"data root {root} holds {what} ({found.relative_to(root)}); {remedy.format(root=root, file=found)}"
            )
    return None


def describe_names(root: Path, missing: str) -> str:
    """What to do where a folder looks like the missing split ("train" or "val") under another name; else empty."""
    if (root / missing).exists():
        return ""
    wanted = ("train",) if missing == "train" else ("val", "test")
    folders = _entries(root)[1]
    names = [path.name for path in folders if split_of(path.name) in wanted]
    if len(names) != 1 or len(folders) > _MANY:
        return ""
    move = shlex.join(["mv", str(root / names[0]), str(root / missing)])
    return f"if {names[0]}/ is meant, rename it: {move}"


def describe_contents(root: Path) -> UserError | None:
    """What a folder without splits holds, and what to type; None where that is nothing known."""
    known = describe_format(root)
    if known is not None:
        return known
    files, folders = _entries(root)
    classes = [folder for folder in folders[:50] if _has_image(_entries(folder)[0][:200])]
    is_split = len(folders) <= _MANY and any(split_of(path.name) and path not in classes for path in folders)
    if len(folders) > 1 and not is_split and not all(split_of(folder.name) for folder in classes):
        return UserError(
            f"data root {root} holds no train/ folder, but class folders (such as {classes[0].name}); "
            f"move them into {root}/train, and some images of each class into {root}/val/CLASS"
        )
    rename = describe_names(root, "train")
    if rename:
        return UserError(f"data root {root} holds no train/ folder; {rename}")
    if _has_image(files):
        return UserError(
            f"data root {root} holds no train/ folder, but images without class folders; "
            "expected train/CLASS/IMAGE and val/CLASS/IMAGE"
        )
    return None


def _has_image(files: list[Path]) -> bool:
    return any(path.suffix.lower() in _IMAGES for path in files)


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files, folders) of a folder, sorted; of a very large one the first that are found."""
    files: list[Path] = []
    folders: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry, _ in zip(entries, range(_LOOKED_AT), strict=False):
                if entry.name[0] != ".":
                    (folders if is_folder(entry) else files).append(Path(entry.path))
    except PermissionError:
        return [], []
    return sorted(files), sorted(folders)
