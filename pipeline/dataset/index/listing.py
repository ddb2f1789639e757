"""Which images a split holds, without opening one: class folders, or a flat folder with the archive's CSV.

Order and labels are those of torchvision's ImageFolder. The mtime of every folder is recorded, so that a later run
detects by some thousand `stat` calls, and no walk, that no file was added or removed.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.dataset.imagenet import SYNSET
from pipeline.dataset.index.left_out import (
    DEAD_LINKS,
    DEVICES,
    FOREIGN,
    LOOPS,
    NO_CLASS,
    Tally,
    by_suffix,
)
from pipeline.dataset.layouts.labels import EXPECTED, ValLabels, find_val_labels
from pipeline.dataset.names import FOREIGN_NAMES, dead_link, distinguish, is_device, is_folder, is_foreign
from pipeline.errors import UserError

#: Suffixes, lower case, that count as images: those of torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

#: Folders of validation images that are no class: where archives unpack to.
FLAT_FOLDERS = ("images", "ILSVRC2012_img_val", "val", "val_images")


@dataclass(frozen=True)
class Places:
    """Where the images of a split in tar files lie.

    shards: tar files, relative to the root; shard: [n] int64, numbers into `shards`; offset, size: [n] int64, bytes.
    """

    shards: list[str]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Listing:
    """The images of one split.

    names: [n] paths relative to the root with '/', in class order, then as ImageFolder orders them.
    classes: sorted names of the classes; labels: [n] int32 into `classes`.
    mtimes: folder, list or tar file that was read, relative to the root -> mtime_ns.
    left_out: what lies there and is in no class, by reason.
    places: where they lie, for a split in tar files; None: each is a file of its own.
    """

    names: list[str]
    classes: list[str]
    labels: np.ndarray
    mtimes: dict[str, int]
    left_out: Tally
    places: Places | None = None

    def describe(self, i: int) -> str:
        """Image i, for messages and lists: its path relative to the root, behind a tar file's path and a colon."""
        name = self.names[i]
        return name if self.places is None else f"{self.places.shards[self.places.shard[i]]}:{name}"


class _Walk:
    """Lists folders below `root`, records the mtime of each (before reading it, so no change is missed), and counts
    what it passes over."""

    def __init__(self, root: Path):
        self.root = root
        self.mtimes: dict[str, int] = {}
        self.left_out = Tally()

    def record_mtime(self, path: Path) -> tuple[int, int]:
        """Returns what identifies the file or folder: (device, inode)."""
        stat = path.stat()
        self.mtimes[os.path.relpath(path, self.root)] = stat.st_mtime_ns
        return stat.st_dev, stat.st_ino

    def pass_over(self, reason: str, path: str) -> None:
        self.left_out.add(reason, os.path.relpath(path, self.root))

    def read(self, folder: Path, is_class: bool = True) -> tuple[list[str], list[str]]:
        """(image names, folder names) in `folder`, sorted; links are followed.

        is_class: the folder belongs to a class, so that every other file in it is counted. Where it is the folder of a
        split, UserError is raised for a link that leads nowhere: it was a class.
        """
        files, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                lower = name.lower()
                if name[0] == "." or lower in FOREIGN_NAMES:  # `is_foreign`, 1.28 M times
                    self.pass_over(FOREIGN, entry.path)
                elif is_folder(entry):
                    folders.append(name)
                elif lower.endswith(IMAGE_SUFFIXES):
                    if is_device(entry):
                        self.pass_over(DEVICES, entry.path)
                    else:
                        files.append(name)
                elif entry.is_symlink() and (gone := dead_link(Path(entry.path))):
                    if not is_class:
                        raise UserError(f"class folder {gone}; mount what holds it, or remove the link")
                    self.pass_over(DEAD_LINKS, entry.path)
                elif is_class:
                    self.pass_over(by_suffix(name), entry.path)
        return sorted(files), sorted(folders)

    def tree(self, folder: Path) -> list[str]:
        """Paths, relative to the root, of all images at any depth below `folder`, ordered by folder, then by name."""
        found: list[tuple[str, list[str]]] = []
        pending: list[tuple[Path, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
        while pending:
            here, above = pending.pop()
            identity = self.record_mtime(here)
            if identity in above:
                self.pass_over(LOOPS, str(here))
                continue
            files, folders = self.read(here)
            found.append((str(here), files))
            pending += ((here / name, above | {identity}) for name in folders)
        names: list[str] = []
        for path, files in sorted(found):
            prefix = os.path.relpath(path, self.root)
            names += (f"{prefix}/{file}" for file in files)
        return names


def _check_classes(folder: Path, names: list[str]) -> None:
    """UserError for two class folders whose names differ only in how they are written."""
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if twin != name:
            raise UserError(f"class folder {folder / twin}: {distinguish(twin, name)}")


def _empty_class(folder: Path) -> UserError:
    """Says what the folder of a class holds instead of images."""
    others = Counter(by_suffix(name) for name in os.listdir(folder) if not is_foreign(name))
    if not others:
        return UserError(f"class folder {folder} holds no image; fill it or remove it")
    held = ", ".join(f"{count:,} {reason}" for reason, count in others.most_common(3))
    return UserError(
        f"class folder {folder} holds no image (but entries {held}); images must end in one of "
        f"{' '.join(IMAGE_SUFFIXES)}: rename them, or remove the folder"
    )


def _check_names(names: list[str], root: Path) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"file name {os.fsencode(name)!r} in {root} is not UTF-8; rename the file") from None


def _find_labels(root: Path, folder: Path, flat: list[str], folders: list[str]) -> ValLabels | None:
    """The list of a validation folder's labels, where it has images or folders that may need it."""
    known = SYNSET.fullmatch
    return find_val_labels(root, folder) if flat or not all(map(known, folders)) else None


def _is_flat(name: str, images: list[str], listed: ValLabels) -> bool:
    """Does a folder hold images of many classes, by a list, such as `images` of Tiny-ImageNet?"""
    return (
        name in FLAT_FOLDERS
        and name not in listed.classes
        and all(PurePosixPath(image).stem in listed.labels for image in images)
    )


def list_places(folders: Sequence[Path], root: Path, empty_ok: bool = False) -> Listing:
    """The images of a split that lies in one folder or in several, as `list_split` lists each."""
    listings = [list_split(folder, root, empty_ok) for folder in folders]
    if len(listings) == 1:
        return listings[0]
    classes = sorted({name for listing in listings for name in listing.classes})
    number = {name: label for label, name in enumerate(classes)}
    rows = sorted(
        (number[listing.classes[label]], part, i)
        for part, listing in enumerate(listings)
        for i, label in enumerate(listing.labels.tolist())
    )
    left_out = sum((listing.left_out for listing in listings), Tally())
    mtimes = {name: mtime for listing in listings for name, mtime in listing.mtimes.items()}
    names = [listings[part].names[i] for _, part, i in rows]
    return Listing(names, classes, np.array([label for label, _, _ in rows], np.int32), mtimes, left_out)


def list_split(folder: Path, root: Path, empty_ok: bool = False) -> Listing:
    """The images of one split, in class folders, or flat where a list beside them gives their classes.

    Raises UserError where there are neither, for an empty class folder (both unless `empty_ok`), and for a flat image
    without a label.
    """
    walk = _Walk(root)
    try:
        walk.record_mtime(folder)
        flat, folders = walk.read(folder, is_class=False)
        _check_classes(folder, folders)
        names: list[str] = []
        synsets: list[str] = []
        unlabeled = [os.path.relpath(folder / name, root) for name in flat]
        listed = None if folder.name == "train" else _find_labels(root, folder, flat, folders)
        for synset in folders:
            of_class = walk.tree(folder / synset)
            if not of_class and not empty_ok:
                raise _empty_class(folder / synset)
            if listed is not None and _is_flat(synset, of_class, listed):
                unlabeled += of_class
                continue
            names += of_class
            synsets += [synset] * len(of_class)
        if unlabeled and listed is not None:
            walk.record_mtime(listed.source)
            unlisted = [name for name in unlabeled if PurePosixPath(name).stem not in listed.labels]
            if unlisted:
                raise UserError(
                    f"image {root / unlisted[0]} has no row in {listed.source}; remove it or fetch that list again"
                )
            names += unlabeled
            synsets += (listed.labels[PurePosixPath(name).stem] for name in unlabeled)
            unlabeled = []
    except OSError as error:
        raise UserError(f"can't read {error.filename} ({error.strerror}); fix that or give another root") from error
    if not names and not empty_ok:
        remedy = f"or {EXPECTED}" if unlabeled and folder.name != "train" else "instead"
        what = "images but no class folders" if unlabeled else "no class folders"
        raise UserError(f"{folder} holds {what}; expected {folder}/CLASS/IMAGE {remedy}".removesuffix(" instead"))
    for name in unlabeled:
        walk.left_out.add(NO_CLASS, name)
    _check_names(names, root)
    classes = sorted(set(synsets))
    number = {synset: label for label, synset in enumerate(classes)}
    labels = np.fromiter((number[synset] for synset in synsets), np.int32, len(synsets))
    if names and (np.diff(labels) < 0).any():  # flat images: put each into its class, where valprep would
        order = sorted(range(len(names)), key=lambda i: (labels[i], names[i].rpartition("/")[2]))
        names, labels = [names[i] for i in order], labels[order]
    return Listing(names, classes, labels, walk.mtimes, walk.left_out)
