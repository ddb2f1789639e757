"""Where a data root's splits lie: folders of images or tar files; also where it is a level too high or low."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.dataset.imagenet import CLS_LOC, SYNSET
from pipeline.dataset.layouts.foreign import describe_contents, describe_file, describe_format, describe_names
from pipeline.dataset.names import dead_link, is_folder, is_foreign, split_of
from pipeline.errors import UserError

Alone = Literal["train", "val"]  #: the split of a data set that is enough for what is to be done
OFFICIAL = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}  #: of image-net.org
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation")
_PART = re.compile(r"(train|val)\.X\d*")  # of ImageNet-100: train.X1 to train.X4, val.X
_OTHER_TARS = re.compile(r"ILSVRC20\d\d_(bbox|img_test|img_train_t3|devkit|dogs)\w*\.tar")
#: Compressed tar files, and parts of downloads; no checksums, lists and notes beside them.
_UNREAD = re.compile(r"\.(tar(\.(gz|xz|bz2|zst|lz4|lzma|zip|part|partial|crdownload|download|incomplete|aria2))+|tgz)$")
_MANY = 100  # folders, above which no data root is looked for below them


@dataclass(frozen=True)
class TarFiles:
    """The tar files of a split, sorted.

    kind: "nested": a tar of one tar a class (`ILSVRC2012_img_train.tar`); "classes": the tars of one class each;
    "flat": images whose labels are in a list (`ILSVRC2012_img_val.tar`); "samples": WebDataset shards.
    """

    kind: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Layout:
    """A data root that was taken: the folders or the tar files of each split ("train", "val"; to score or to train,
    one of them alone).

    note: one line that says what was taken instead of the folder that was given, or of two, and which files of the
    splits are missing or not read; empty where all is clear.
    """

    root: Path
    folders: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    tars: dict[str, TarFiles] = field(default_factory=dict)
    note: str = ""

    @property
    def splits(self) -> list[str]:
        return [split for split in ("train", "val") if split in self.folders or split in self.tars]

    @property
    def base(self) -> Path:
        """The folder that the folders of the splits lie in."""
        return next((folders[0].parent for folders in self.folders.values()), self.root)

    def places(self) -> list[Path]:
        """Every folder and tar file of the splits."""
        places = [path for folders in self.folders.values() for path in folders]
        return places + [path for tars in self.tars.values() for path in tars.files]


def find_layout(root: Path, alone: Alone | None = None) -> Layout:
    """The layout of the data root `root`, or of the one folder just above or below it that is a data root.

    alone: this split alone is enough. With "val", where `root` holds no train/, it may be that split itself, a folder a
    class (as ImageNet-V2 comes).

    Raises UserError for anything else, in one line that says what `root` holds and what to do.
    """
    if root.is_file():
        raise describe_file(root)
    if not root.is_dir():
        wanted = "the images" if alone else "train/ and val/"
        raise UserError(f"data root {root} does not exist or is not a folder; give the folder that holds {wanted}")
    own = _look(root)
    if "train" in own.splits:
        bare = "train" in own.folders and not any(path for folder in own.folders["train"] for path in _folders(folder))
        foreign = describe_format(root) if bare else None
        if foreign is not None:
            raise foreign
        if "val" not in own.splits and alone != "train":
            what = own.tars["train"].files[0].name if "train" in own.tars else "train/"
            where = (
                f"put {OFFICIAL['val']} beside it"
                if what in OFFICIAL.values()
                else describe_names(own.base, "val") or "put the validation images into val/"
            )
            raise UserError(f"data root {root} holds {what} but neither val/ nor test/; {where}")
        return own
    if alone == "val" and own.splits:
        return own
    for above in _above(root):
        layout = _look(above)
        if len(layout.splits) == 2 and not (alone == "val" and above == root.parent and root.name in VAL_NAMES):
            return _taken(layout, root)
    below, denied = _below(root)
    if len(below) == 1:
        return _taken(below[0], root)
    if alone == "val":
        return Layout(root, {"val": (root,)})
    if "val" in own.tars:
        name = own.tars["val"].files[0].name
        raise UserError(
            f"data root {root} holds {name} but no training images; put train/ or the training tar files beside it, "
            f"named {OFFICIAL['train'] if name == OFFICIAL['val'] else 'train-*.tar'}"
        )
    if below:
        some = ", ".join(layout.root.name for layout in below[:4])
        raise UserError(f"data root {root} holds {len(below)} data sets ({some}{', ...' * (len(below) > 4)}); give one")
    if denied:
        raise UserError(
            f"{denied[0]}: Permission denied for this account; ask its owner for access, or give another root"
        )
    raise describe_contents(root) or UserError(
        f"data root {root} holds no train/ folder; expected train/CLASS/IMAGE and val/CLASS/IMAGE"
    )


def find_val_folder(root: Path) -> Path:
    """The folder with the validation images of `root`, for those that write into it. UserError where there is none."""
    if root.is_file():
        raise describe_file(root)
    if not root.is_dir():
        raise UserError(
            f"data root {root} does not exist or is not a folder; give the folder that holds ILSVRC/ or val/"
        )
    for here in [root, *_above(root), *(layout.root for layout in _below(root)[0])]:
        folders = _look(here, with_test=False).folders.get("val", ())
        if len(folders) == 1:
            return folders[0]
    if root.name in VAL_NAMES:
        return root
    raise describe_contents(root) or UserError(
        f"data root {root} holds no validation images; expected {root / CLS_LOC / 'val'} or {root / 'val'}"
    )


def _taken(layout: Layout, given: Path) -> Layout:
    return Layout(layout.root, layout.folders, layout.tars, f"{given} is not a data root itself: taking {layout.root}")


def _above(root: Path) -> Iterator[Path]:
    """Data roots that `root` may be a part of: above ILSVRC, ILSVRC/Data or .../CLS-LOC, or above train or val."""
    for depth in range(1, len(CLS_LOC.parts) + 1):
        if root.parts[-depth:] == CLS_LOC.parts[:depth]:
            yield root.parents[depth - 1]
    for inner in (CLS_LOC.relative_to("ILSVRC"), Path("CLS-LOC")):
        if (root / inner).is_dir():
            yield root / inner
    if root.name in (*TRAIN_NAMES, *VAL_NAMES):
        yield root.parent


def _below(root: Path) -> tuple[list[Layout], list[Path]]:
    """The data roots one level below `root`, or else two; and the folders that this account may not enter."""
    level, denied = [root], []
    for _ in range(2):
        level = [path for folder in level if folder not in denied for path in _folders(folder)]
        found = []
        for folder in level:
            try:
                layout = _look(folder)
            except PermissionError:
                denied.append(folder)
                continue
            if len(layout.splits) == 2:
                found.append(layout)
        if found or len(level) > _MANY:
            return found, denied
    return [], denied


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if not is_foreign(entry.name) and is_folder(entry))
    except PermissionError:
        return []


def _look(root: Path, with_test: bool = True) -> Layout:
    """The splits that lie directly in `root`."""
    base = root / CLS_LOC if (root / CLS_LOC).is_dir() else root
    for name in (*TRAIN_NAMES, *VAL_NAMES):
        gone = dead_link(base / name)
        if gone is not None:
            raise UserError(f"{gone}; mount what holds it, or fix the link")
    folders: dict[str, tuple[Path, ...]] = {}
    tars: dict[str, TarFiles] = {}
    note = ""
    shards = _find_shards(root)
    for split, names in (("train", TRAIN_NAMES), ("val", VAL_NAMES)):
        there = [name for name in names if (base / name).is_dir()]
        folder = base / there[0] if there else None
        if len(there) > 1 and not (base / there[0]).samefile(base / there[1]):
            note = f"{base} holds {'/ and '.join(there)}/: taking {there[0]}/"
        official, parts = root / OFFICIAL[split], _find_parts(root, split)
        if folder is not None and (inside := _tars_of(folder)):
            tars[split] = inside
        elif folder is not None:
            folders[split] = (folder,)
        elif parts:
            folders[split] = parts
        elif official.is_file():
            tars[split] = TarFiles("nested" if split == "train" else "flat", (official,))
        elif split in shards:
            tars[split] = TarFiles("samples", shards[split])
    if with_test and "val" not in folders and "val" not in tars and base == root:
        if (root / "test").is_dir():
            inside = _tars_of(root / "test")
            tars |= {"val": inside} if inside else {}
            folders |= {} if inside else {"val": (root / "test",)}
        elif "test" in shards:
            tars["val"] = TarFiles("samples", shards["test"])
    return Layout(root, folders, tars, "; ".join(filter(None, (note, _find_gap(tars), _unread(tars)))))


def _unread(tars: dict[str, TarFiles]) -> str:
    """Says which files beside the tar files of the splits are compressed ones or not whole; empty where none is."""
    for folder in sorted({path.parent for found in tars.values() for path in found.files}):
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if _UNREAD.search(e.name.lower()) and not is_foreign(e.name))
        names = [name for name in names if not _OTHER_TARS.match(name)]
        if names:
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            return f"{folder} also holds {names[0]}{more}: not read, as it is compressed or not whole"
    return ""


def _find_gap(tars: dict[str, TarFiles]) -> str:
    """Says which numbered shard is not there, between others that are; empty where none is missing."""
    for found in tars.values():
        numbers: dict[tuple[str, int], list[int]] = {}
        for path in found.files if found.kind == "samples" else ():
            if match := re.fullmatch(r"(.*?)(\d+)", path.stem):
                numbers.setdefault((match[1], len(match[2])), []).append(int(match[2]))
        for (start, digits), there in numbers.items():
            missing = sorted(set(range(min(there), max(there) + 1)) - set(there))
            if missing and len(missing) <= len(there):
                name = f"{start}{missing[0]:0{digits}d}.tar"
                more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
                return f"{found.files[0].parent} has no {name}{more}, but has those before and behind: were they lost?"
    return ""


def _find_parts(root: Path, split: str) -> tuple[Path, ...]:
    """The folders of a split of ImageNet-100."""
    found = [path for path in _folders(root) if (part := _PART.fullmatch(path.name)) and part[1] == split]
    return tuple(found)


def _tars_of(folder: Path) -> TarFiles | None:
    """The tar files of a split's folder, where it holds these and no other folder or image."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_foreign(entry.name):
                continue
            if is_folder(entry) or entry.name.lower().endswith((".jpeg", ".jpg", ".png")):
                return None
            if entry.name.lower().endswith(".tar"):
                names.append(entry.name)
    files = tuple(folder / name for name in sorted(names))
    if not files:
        return None
    return TarFiles("classes" if all(SYNSET.fullmatch(path.stem) for path in files) else "samples", files)


def _find_shards(root: Path) -> dict[str, tuple[Path, ...]]:
    """Tar files in `root` by the split that their names give."""
    found: dict[str, list[Path]] = {}
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(".tar") and entry.name[0] != ".")
    for name in names:
        if name in OFFICIAL.values() or _OTHER_TARS.fullmatch(name):
            continue
        split = split_of(name)
        if split:
            found.setdefault(split, []).append(root / name)
    return {split: tuple(files) for split, files in found.items()}
