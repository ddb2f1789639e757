"""What is particular to ImageNet (ILSVRC 2012 classification): its layout, its lists, its class order.

The archive's own text files are the source: `LOC_synset_mapping.txt` (words), `LOC_val_solution.csv`
(validation labels). The class order is that of the sorted synsets, as torchvision's and timm's weights use it.
"""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError

TRAIN_IMAGES, VAL_IMAGES, CLASSES = 1_281_167, 50_000, 1_000
CLS_LOC = Path("ILSVRC/Data/CLS-LOC")
SYNSET_MAPPING = "LOC_synset_mapping.txt"
VAL_SOLUTION = "LOC_val_solution.csv"
TRAIN_LIST = "ILSVRC/ImageSets/CLS-LOC/train_cls.txt"
#: Images of the archive that are odd and yet no error: the one PNG, and those in CMYK.
KNOWN_PNG = frozenset({"n02105855_2933"})
KNOWN_CMYK = frozenset(
    {
        "n01739381_1309",
        "n02077923_14822",
        "n02447366_23489",
        "n02492035_15739",
        "n02747177_10752",
        "n03018349_4028",
        "n03062245_4620",
        "n03347037_9675",
        "n03467068_12171",
        "n03529860_11437",
        "n03544143_17228",
        "n03633091_5218",
        "n03710637_5125",
        "n03961711_5286",
        "n04033995_2932",
        "n04258138_17003",
        "n04264628_27969",
        "n04336792_7448",
        "n04371774_5854",
        "n04596742_4225",
        "n07583066_647",
        "n13037406_4650",
    }
)
SYNSET = re.compile(r"n\d{8}")


def find_list(root: Path, name: str) -> Path | None:
    """One of the archive's lists: in `root`, or above it where `root` is the archive's `ILSVRC`, `ILSVRC/Data` or
    `ILSVRC/Data/CLS-LOC`."""
    homes = [root]
    for depth in range(1, len(CLS_LOC.parts) + 1):
        if root.parts[-depth:] == CLS_LOC.parts[:depth]:
            homes.append(root.parents[depth - 1])
    return next((home / name for home in homes if (home / name).is_file()), None)


def read_synset_words(root: Path) -> dict[str, str]:
    """Synset -> words from `LOC_synset_mapping.txt`; empty where there is none."""
    path = find_list(root, SYNSET_MAPPING)
    if path is None:
        return {}
    words = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error}); fetch the file again") from error
    for line in lines:
        synset, _, text = line.strip().partition(" ")
        if synset:
            words[synset] = text
    return words


def read_val_solution(path: Path) -> dict[str, str]:
    """Image id (no suffix) -> synset from `LOC_val_solution.csv`: the first synset of each row.

    Raises UserError that names file and line where a row is not `ImageId,synset ...`.
    """
    labels: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or (number == 1 and row[0] == "ImageId"):
                    continue
                synset = row[1].split(maxsplit=1)[0] if len(row) == 2 and row[1].strip() else ""
                if not SYNSET.fullmatch(synset) or not row[0] or "/" in row[0]:
                    raise UserError(
                        f"{path}, line {number}: expected 'ImageId,synset x1 y1 x2 y2 ...', "
                        f"got {','.join(row)[:80]!r}; fetch the file again"
                    )
                if labels.setdefault(row[0], synset) != synset:
                    raise UserError(
                        f"{path}, line {number}: {row[0]} is of {synset}, and of {labels[row[0]]} above it; remove the "
                        "wrong row, or fetch the file again"
                    )
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: not a CSV text file ({error}); fetch the file again") from error
    if not labels:
        raise UserError(f"{path} names no image; fetch the file again")
    return labels


def read_train_list(path: Path) -> Iterator[str]:
    """The training images that `train_cls.txt` lists, one by one: "n01440764/n01440764_10026". UserError where it is no
    text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if name := line.partition(" ")[0].strip():
                    yield name
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error}); fetch the file again") from error
