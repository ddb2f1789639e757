"""What a data root is supposed to hold: by the archive's own lists, and by what was asked for when it was fetched."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from pipeline.dataset import imagenet
from pipeline.dataset.selected import read_selected
from pipeline.dataset.valprep import read_any_val_labels
from pipeline.errors import UserError

Chosen = dict[str, frozenset[str] | None]  #: split -> synsets that were asked for, None: all


def hash_ids(ids: Iterable[str]) -> np.ndarray:
    """xxh3_64 of each id, uint64 [n]: a million ids in 8 MB."""
    return np.fromiter((xxhash.xxh3_64_intdigest(name.encode()) for name in ids), np.uint64)


def train_id(synset: str, stem: str) -> str:
    """How the archive's list names a training image: `n01440764/n01440764_10026`. A validation image: by its stem."""
    return f"{synset}/{stem}"


def read_chosen(root: Path) -> Chosen | None:
    """`read_selected` as sets."""
    selected = read_selected(root)
    if selected is None:
        return None
    return {split: None if part == "all" else frozenset(part) for split, part in selected.items()}


@dataclass(frozen=True)
class Expected:
    """The images of a root by the lists. A split without a list is not in `counts`.

    counts: split -> images; synsets: those of the lists, sorted; val_labels: image id -> synset.
    """

    root: Path
    chosen: Chosen | None
    counts: dict[str, int] = field(default_factory=dict)
    synsets: tuple[str, ...] = ()
    val_labels: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def is_imagenet(self) -> bool:
        """Are these the lists of the whole ILSVRC 2012 set?"""
        return self.counts == {"train": imagenet.TRAIN_IMAGES, "val": imagenet.VAL_IMAGES} and (
            len(self.synsets) == imagenet.CLASSES
        )

    def wants(self, split: str, synset: str) -> bool:
        if self.chosen is None:
            return True
        part = self.chosen.get(split, frozenset())
        return part is None or synset in part

    def wants_split(self, split: str) -> bool:
        return self.chosen is None or split in self.chosen

    def ids(self, split: str) -> Iterator[str]:
        """Ids of the images that should be there, in the list's order."""
        if split == "val":
            yield from (name for name, synset in self.val_labels.items() if self.wants("val", synset))
        elif split == "train":
            names = imagenet.read_train_list(self.root / imagenet.TRAIN_LIST)
            yield from (name for name in names if self.wants("train", name.partition("/")[0]))


def read_expected(root: Path) -> Expected:
    """Read the lists of `root`; what they do not contain is left out. UserError for a damaged one."""
    chosen = read_chosen(root)
    labels, _ = read_any_val_labels(root)
    draft = Expected(root, chosen, val_labels=labels)
    counts: dict[str, int] = {}
    synsets: set[str] = set()
    if (root / imagenet.TRAIN_LIST).is_file() and draft.wants_split("train"):
        counts["train"] = 0
        for name in draft.ids("train"):
            synset, slash, stem = name.partition("/")
            if not slash or not stem:
                raise UserError(
                    f"{root / imagenet.TRAIN_LIST}: expected 'SYNSET/IMAGE NUMBER', got {name[:80]!r}; fetch it again"
                )
            counts["train"] += 1
            synsets.add(synset)
    if labels and draft.wants_split("val"):
        counts["val"] = sum(1 for _ in draft.ids("val"))
        synsets.update(synset for synset in labels.values() if draft.wants("val", synset))
    return Expected(root, chosen, counts, tuple(sorted(synsets)), labels)
