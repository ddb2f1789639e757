"""What an archive holds of ImageNet: images by split, lists, boxes; and whether it is all that its own lists name."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from pipeline.dataset import imagenet
from pipeline.dataset.acquire.selection import (
    BASE,
    LIST,
    NESTED,
    SPLITS,
    TRAIN_IMAGE,
    VAL_BOX,
    VAL_IMAGE,
    Selection,
    final_name,
)
from pipeline.dataset.acquire.zip_directory import Directory, decode_name
from pipeline.dataset.valprep import read_any_val_labels
from pipeline.errors import UserError

_OTHER, TRAIN, VAL, LISTS, BOXES, TAR = range(6)


@dataclass(frozen=True)
class Catalog:
    """`kinds`: [n] uint8, one of the constants above for each member of `directory`; `synsets`: of the training set."""

    directory: Directory
    kinds: np.ndarray
    synsets: frozenset[str]

    def numbers(self, kind: int) -> np.ndarray:
        """Member numbers of a kind, ascending."""
        return np.flatnonzero(self.kinds == kind)

    def select(self, selection: Selection) -> dict[str, np.ndarray]:
        """Member numbers of the wanted images of each split."""
        wanted = {}
        for split, kind in zip(SPLITS, (TRAIN, VAL), strict=True):
            numbers = self.numbers(kind) if selection.has(split) else np.zeros(0, np.int64)
            if selection.synsets is not None:
                keep = [selection.wants(name) is not None for name in iter_names(self.directory, numbers)]
                numbers = numbers[np.array(keep, bool)] if keep else numbers
            wanted[split] = numbers
        return wanted


def iter_names(directory: Directory, numbers: np.ndarray | None = None) -> Iterator[str]:
    """Names of the members `numbers` (default: all), without ever holding them all."""
    entries = directory.entries
    for first in range(0, len(entries) if numbers is None else len(numbers), 1 << 16):
        part = entries[first : first + (1 << 16)] if numbers is None else entries[numbers[first : first + (1 << 16)]]
        fields = zip(*(part[key].tolist() for key in ("name_offset", "name_length", "flags")), strict=True)
        for start, length, flags in fields:
            yield decode_name(directory.blob[start : start + length], flags)


def make_catalog(directory: Directory) -> Catalog:
    """Sort the members of an archive by kind. UserError where it holds nothing of ImageNet."""
    kinds = np.zeros(len(directory), np.uint8)
    synsets = set()
    for i, name in enumerate(iter_names(directory)):
        if match := TRAIN_IMAGE.fullmatch(name):
            kinds[i] = TRAIN
            synsets.add(match[1])
        elif VAL_BOX.fullmatch(name):
            kinds[i] = BOXES
        elif VAL_IMAGE.fullmatch(name):
            kinds[i] = VAL
        elif LIST.fullmatch(name):
            kinds[i] = LISTS
        elif NESTED.fullmatch(name):
            kinds[i] = TAR
    if not np.isin(kinds, (TRAIN, VAL, TAR)).any():
        raise UserError(
            f"{directory.archive} holds no image of {BASE}/train or {BASE}/val among its {len(kinds):,} members; "
            "is it the archive of the competition?"
        )
    return Catalog(directory, kinds, frozenset(synsets))


def read_val_labels(root: Path) -> dict[str, str]:
    """Image id -> synset from `LOC_val_solution.csv` in `root`, else from the annotations; empty where neither is."""
    return read_any_val_labels(root)[0]


def hash_name(name: str) -> int:
    """64 bits of a member's place in the tree (validation images: flat)."""
    return xxhash.xxh3_64_intdigest(final_name(name).encode("utf-8", "surrogateescape"))


def check_listed(archive: str, root: Path, selection: Selection, held: dict[str, np.ndarray]) -> None:
    """UserError where the archive lacks images that its own lists (already in `root`) name.

    `held`: split -> `hash_name` of the wanted images that the archive holds, [n] uint64.
    """
    train_list = root / imagenet.TRAIN_LIST
    listed: dict[str, Iterable[str]] = {}
    if selection.has("train") and train_list.is_file():
        listed["train"] = (f"{BASE}/train/{image}.JPEG" for image in imagenet.read_train_list(train_list))
    if selection.has("val"):
        listed["val"] = (f"{BASE}/val/{image}.JPEG" for image in selection.val_labels)
    for split, names in listed.items():
        named = [name for name in names if selection.wants(name)]
        missing = np.flatnonzero(~np.isin(np.fromiter(map(hash_name, named), np.uint64, len(named)), held[split]))
        if len(missing):
            raise UserError(
                f"{archive} is incomplete: it lacks {len(missing):,} of the {len(named):,} {split} images that "
                f"its own lists name, such as {named[missing[0]]}; give the complete archive"
            )
