"""Parquet files of Hugging Face data sets: which of them hold which split, by their names."""

import os
from pathlib import Path

_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val"}
_BELOW = ("", "data", "default")


def find_parquet(root: Path) -> dict[str, tuple[Path, ...]]:
    """The files of each split ("train", "val"), sorted; empty where `root` does not hold both.

    `data/train-00000-of-00294.parquet`, `train-0.parquet`, `train.parquet` or `train/0000.parquet`; where there is no
    validation split, "test" stands for it.
    """
    for below in _BELOW:
        found: dict[str, list[Path]] = {}
        for path in _entries(root / below):
            inside = _entries(path) if path.suffix == "" and path.is_dir() else [path]
            word = path.name.lower().partition(".")[0].partition("-")[0].partition("_")[0]
            files = [file for file in inside if file.suffix == ".parquet"]
            if files:
                found.setdefault(_SPLITS.get(word, word), []).extend(files)
        if "val" not in found and "test" in found:
            found["val"] = found["test"]
        if "train" in found and "val" in found:
            return {split: tuple(sorted(found[split])) for split in ("train", "val")}
    return {}


def _entries(folder: Path) -> list[Path]:
    try:
        return [folder / name for name in sorted(os.listdir(folder)) if name[0] != "."]
    except OSError:
        return []
