"""Which output of a network stands for which class folder of a data set that it may not have been trained on."""

import re
from collections.abc import Sequence

import numpy as np

from pipeline.counts import count
from pipeline.dataset.imagenet import read_synset_words
from pipeline.dataset.index.index import Index
from pipeline.dataset.synsets import SYNSETS
from pipeline.errors import UserError


def class_positions(folders: Sequence[str], known: Sequence[str] | None, outputs: int, root: str) -> np.ndarray:
    """The output of each class folder, int64 [n].

    By name where the network's classes are `known`, or are ImageNet's 1,000 and the folders have their names; folders
    named 0, 1, ... (as in ImageNet-V2) are the outputs' own numbers, unless the known classes have such names
    themselves; as many folders as outputs, with nothing known, are in order. Raises UserError that names a folder that
    fits nowhere.
    """
    if known is None and outputs == len(SYNSETS) and set(folders) <= set(SYNSETS):
        known = SYNSETS
    if known is not None and set(folders) <= set(known):
        places = {name: number for number, name in enumerate(known)}
        return np.array([places[name] for name in folders], np.int64)
    named_by_number = known is not None and any(name.isdecimal() for name in known)
    if not named_by_number and all(name.isdecimal() and int(name) < outputs for name in folders):
        return np.array([int(name) for name in folders], np.int64)
    if known is None and len(folders) == outputs:
        return np.arange(outputs)
    if known is None:
        raise UserError(
            f"{root} has {count(len(folders), 'class')} and the network {count(outputs, 'output')}, and "
            "nothing says which is which; put LOC_synset_mapping.txt into it, or give a data set with all classes"
        )
    unknown = next(name for name in folders if name not in set(known))
    raise UserError(
        f"{root} has the class '{unknown}', which the network does not have; its classes are like '{known[0]}'"
    )


def imagenet_classes(index: Index, outputs: int) -> list[str] | None:
    """The synsets in the order of ImageNet's published weights, as far as this data set says: from the archive's
    mapping beside it, because it holds them all, or by ImageNet's own list."""
    if outputs == len(SYNSETS) and set(index.synsets) <= set(SYNSETS):
        return list(SYNSETS)
    words = read_synset_words(index.root)
    if len(words) == outputs:
        return sorted(words)
    return list(index.synsets) if index.num_classes == outputs and not index.synsets[0].isdecimal() else None


def order_warning(folders: Sequence[str]) -> str | None:
    """A line where timm would give the classes another order than ours, which is torchvision's."""

    def timms(name: str) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    others = sorted(folders, key=timms)
    if others == list(folders):
        return None
    first = next(number for number, pair in enumerate(zip(folders, others, strict=True)) if pair[0] != pair[1])
    return (
        f"nothing says which output is which class: they are taken in the order of torchvision's ImageFolder, where "
        f"output {first} is '{folders[first]}'; in timm's order it is '{others[first]}'"
    )
