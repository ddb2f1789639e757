"""Parquet files of Hugging Face data sets: which of them hold which split, by their names."""

import os
import re
from pathlib import Path

from pipeline.dataset.layouts.find import TRAIN_NAMES, VAL_NAMES, find_layout
from pipeline.dataset.names import dead_link, is_foreign, split_of
from pipeline.errors import UserError

_SPLITS = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}
_BELOW = ("", "data", "default")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)")  # as Hugging Face numbers the files of a split
_MANY = 100  # folders, above which none below them is looked into


def find_parquet(root: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each split ("train", "val"), sorted; empty where `root` is to be packed as a tree or as tar files.

    `data/train-00000-of-00294.parquet`, `train-0.parquet`, `train.parquet` or `train/0000.parquet`, in `root` or in a
    folder of it; where there is no validation split, "test" stands for it. Images with a parquet file beside them are
    packed as such. Raises UserError for parquet files of one split alone, for such whose names tell of none, and
    where files of a split are missing or links that lead nowhere.
    """
    try:
        layout = find_layout(root)
    except UserError:
        if any(dead_link(path) or _folders(path) for path in (root / name for name in (*TRAIN_NAMES, *VAL_NAMES))):
            return {}  # a tree that is not whole
        layout = None
    if layout is not None and layout.root == root:
        return {}
    partly: dict[str, list[Path]] = {}
    for here in [root, *_folders(root)]:
        for below in _BELOW:
            found = _look(here / below)
            if "train" in found and "val" in found:
                for split in ("train", "val"):
                    _refuse_dead_links(found[split])
                    _refuse_gaps(found[split])
                return {split: tuple(sorted(found[split])) for split in ("train", "val")}
            partly = partly or found
    if layout is not None or not partly:
        return {}
    held = next(iter(partly.values()))[0]
    if set(partly) & {"train", "val"}:
        have, lack = ("train", "validation") if "train" in partly else ("validation", "train")
        raise UserError(
            f"{root} holds parquet files of the {have} split ({held.relative_to(root)}), but none of the {lack} split; "
            f"put them beside, named {lack}-*.parquet"
        )
    raise UserError(
        f"{root} holds parquet files whose names give no split ({held.relative_to(root)}); name them train-*.parquet "
        "and validation-*.parquet, or put them into train/ and validation/"
    )


def _look(folder: Path) -> dict[str, list[Path]]:
    """The parquet files in a folder, and in those below it with a split's name, by split; those without one by ""."""
    found: dict[str, list[Path]] = {}
    for path in _entries(folder):
        if path.suffix.lower() == ".parquet":
            found.setdefault(_split_of(path.name), []).append(path)
        elif path.name.lower() in _SPLITS and path.is_dir():
            files = [file for file in _entries(path) if file.suffix.lower() == ".parquet"]
            if files:
                found.setdefault(_SPLITS[path.name.lower()], []).extend(files)
    if "val" not in found and "test" in found:
        found["val"] = found["test"]
    return found


def _refuse_dead_links(files: list[Path]) -> None:
    """UserError for a file that is a link to nothing, as a pruned cache of the hub leaves it."""
    for path in files:
        if gone := dead_link(path):
            raise UserError(f"{gone}; download that file again, or remove the link")


def _refuse_gaps(files: list[Path]) -> None:
    """UserError where `train-00000-of-00294.parquet` says that there are more files than are there."""
    numbers: dict[tuple[str, str], dict[int, Path]] = {}
    for path in files:
        if match := _NUMBERED.search(path.name):
            start = str(path.with_name(path.name[: match.start()]))
            numbers.setdefault((start, match[2]), {})[int(match[1])] = path
    for (start, total), there in numbers.items():
        missing = [number for number in range(int(total)) if number not in there]
        if missing:
            lost = f"{start}-{missing[0]:0{len(total)}d}-of-{total}.parquet"
            raise UserError(
                f"{lost} is not there ({len(missing):,} of {int(total):,} files are missing); download the whole set, "
                "or rename the files without -of-N to take just these"
            )


def _split_of(name: str) -> str:
    """The split that a file's name gives: by its first word, or else by any other; empty where none does."""
    name = name.lower()
    first = name.partition(".")[0].partition("-")[0].partition("_")[0]
    return _SPLITS.get(first) or split_of(name)


def _folders(root: Path) -> list[Path]:
    folders = [path for path in _entries(root) if path.name not in _BELOW and path.is_dir()]
    return folders if len(folders) <= _MANY else []


def _entries(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if not is_foreign(name)]
    except OSError:
        return []
