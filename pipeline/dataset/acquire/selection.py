"""Which members of ImageNet's archive are wanted: a split, some classes, and the lists of their labels."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.dataset import imagenet
from pipeline.errors import UserError

BASE = imagenet.CLS_LOC.as_posix()
TRAIN_IMAGE = re.compile(rf"{BASE}/train/(n\d{{8}})/([^/]+\.JPEG)")
VAL_IMAGE = re.compile(rf"{BASE}/val/(?:n\d{{8}}/)?([^/]+\.JPEG)")
VAL_BOX = re.compile(r"ILSVRC/Annotations/CLS-LOC/val/([^/]+)\.xml")
LIST = re.compile(r"LOC_[a-z_]+\.(csv|txt)|ILSVRC/ImageSets/CLS-LOC/[a-z_]+\.txt")
NESTED = re.compile(r"[^/]+\.(tar\.gz|tgz|tar)")
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Selection:
    """`split`: "all", "train" or "val". `classes`: how many of the sorted synsets, which ones, or None for all."""

    split: str = "all"
    classes: int | tuple[str, ...] | None = None
    val_labels: dict[str, str] = field(default_factory=dict, repr=False)  #: image id -> synset, where known
    synsets: frozenset[str] | None = None  #: what `classes` means in this archive; None: all

    def has(self, split: str) -> bool:
        return self.split in ("all", split)

    def wants(self, name: str) -> str | None:
        """ "train" or "val" where the member is an image that is wanted, else None."""
        if match := TRAIN_IMAGE.fullmatch(name):
            return "train" if self.has("train") and self._wants_class(match[1]) else None
        if self.has("val") and (match := VAL_IMAGE.fullmatch(name)):
            if self.synsets is None:
                return "val"
            image = PurePosixPath(match[1]).stem
            if image not in self.val_labels:
                raise UserError(f"image {name} has no row in {imagenet.VAL_SOLUTION}, so its class is not known")
            return "val" if self._wants_class(self.val_labels[image]) else None
        return None

    def _wants_class(self, synset: str) -> bool:
        return self.synsets is None or synset in self.synsets

    def resolve(self, synsets: Iterable[str], val_labels: dict[str, str]) -> "Selection":
        """The same with the archive's classes and labels filled in. UserError for a synset that it does not have."""
        known = sorted(set(synsets))
        if self.classes is None:
            chosen = None
        elif isinstance(self.classes, int):
            if self.classes > len(known):
                raise UserError(f"--classes {self.classes}: the archive has {len(known)} classes; ask for fewer")
            chosen = frozenset(known[: self.classes])
        else:
            unknown = sorted(set(self.classes) - set(known))
            if unknown:
                raise UserError(f"--classes: the archive has no class {unknown[0]}; see LOC_synset_mapping.txt")
            chosen = frozenset(self.classes)
        return Selection(self.split, self.classes, val_labels, chosen)


def parse_classes(text: str | None) -> int | tuple[str, ...] | None:
    """ "10" or "n01440764,n01443537" as a value for `Selection.classes`. UserError for anything else."""
    if text is None:
        return None
    words = [word for word in re.split(r"[,\s\[\]'\"]+", text) if word]
    if len(words) == 1 and words[0].isdigit() and int(words[0]) > 0:
        return int(words[0])
    wrong = [word for word in words if not imagenet.SYNSET.fullmatch(word)]
    if wrong or not words:
        raise UserError(f"--classes {text!r}: give a number, or synsets like n01440764,n01443537")
    return tuple(sorted(set(words)))


def final_name(name: str) -> str:
    """Where a member lies in the tree before valprep: validation images flat in val/."""
    match = VAL_IMAGE.fullmatch(name)
    return f"{BASE}/val/{match[1]}" if match else name
