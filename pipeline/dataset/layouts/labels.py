"""Where the labels of validation images that lie flat come from: a list beside them, whatever its form."""

import functools
from dataclasses import dataclass
from pathlib import Path

from pipeline.dataset import imagenet
from pipeline.dataset.layouts.devkit import find_devkit
from pipeline.errors import UserError

TINY_LIST = "val_annotations.txt"  #: of Tiny-ImageNet: "val_0.JPEG<tab>n03444034<tab>x<tab>y<tab>w<tab>h"
EXPECTED = f"{imagenet.VAL_SOLUTION}, {TINY_LIST} or ILSVRC2012_devkit_t12 beside it"  #: for messages


@dataclass(frozen=True)
class ValLabels:
    """`labels`: image (file name without suffix) -> class; `source`: the file or kit that says so."""

    labels: dict[str, str]
    source: Path

    @functools.cached_property
    def classes(self) -> frozenset[str]:
        return frozenset(self.labels.values())


def find_val_labels(root: Path, folder: Path) -> ValLabels | None:
    """The list of the labels of the images in `folder`, a validation folder of the data root `root`.

    Looked for in this order: Kaggle's CSV, Tiny-ImageNet's list, the development kit of image-net.org. None where there
    is none. Raises UserError where one is damaged.
    """
    solution = imagenet.find_list(root, imagenet.VAL_SOLUTION)
    if solution is not None:
        return ValLabels(imagenet.read_val_solution(solution), solution)
    if (folder / TINY_LIST).is_file():
        return ValLabels(read_tiny_list(folder / TINY_LIST), folder / TINY_LIST)
    devkit = find_devkit([root, folder, folder.parent])
    return None if devkit is None else ValLabels(devkit.read_labels(), devkit.source)


def read_tiny_list(path: Path) -> dict[str, str]:
    """Image -> class from Tiny-ImageNet's list. Raises UserError that names file and line where one is damaged."""
    labels: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except PermissionError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}); unpack the data set again") from error
    for number, line in enumerate(lines, 1):
        image, *rest = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            continue
        if not rest or not rest[0].strip() or "/" in image:
            raise UserError(f"{path}, line {number}: expected 'IMAGE CLASS ...', got {line[:80]!r}")
        stem, name = image.rpartition(".")[0] or image, rest[0].strip()
        if labels.setdefault(stem, name) != name:
            raise UserError(
                f"{path}, line {number}: {image} is of {name}, and of {labels[stem]} above it; remove the wrong row"
            )
    if not labels:
        raise UserError(f"{path} names no image; unpack the data set again")
    return labels
