"""Which images a split holds, without opening one: class folders, or a flat folder with the archive's CSV.

Order and labels are those of torchvision's ImageFolder. The mtime of every folder is recorded, so that a later run
detects by some thousand `stat` calls, and no walk, that no file was added or removed.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dataset import imagenet
from pipeline.errors import UserError

#: Suffixes, lower case, that count as images: those of torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listing:
    """The images of one split.

    names: [n] paths relative to the root with '/', in class order, then as ImageFolder orders them.
    classes: sorted names of the classes; labels: [n] int32 into `classes`.
    mtimes: folder or list that was read, relative to the root -> mtime_ns.
    """

    names: list[str]
    classes: list[str]
    labels: np.ndarray
    mtimes: dict[str, int]


class _Walk:
    """Lists folders below `root` and records the mtime of each (before reading it, so no change is missed)."""

    def __init__(self, root: Path):
        self.root = root
        self.mtimes: dict[str, int] = {}

    def record_mtime(self, path: Path) -> None:
        self.mtimes[os.path.relpath(path, self.root)] = path.stat().st_mtime_ns

    def read(self, folder: Path) -> tuple[list[str], list[str]]:
        """(image names, folder names) in `folder`, sorted; links are followed."""
        self.record_mtime(folder)
        files, folders = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    files.append(entry.name)
        return sorted(files), sorted(folders)

    def tree(self, folder: Path) -> list[str]:
        """Paths, relative to the root, of all images at any depth below `folder`, ordered by folder, then by name."""
        found: list[tuple[str, list[str]]] = []
        pending = [folder]
        while pending:
            here = pending.pop()
            files, folders = self.read(here)
            found.append((str(here), files))
            pending += (here / name for name in folders)
        names: list[str] = []
        for path, files in sorted(found):
            prefix = os.path.relpath(path, self.root)
            names += (f"{prefix}/{file}" for file in files)
        return names


def _check_names(names: list[str], root: Path) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"file name {os.fsencode(name)!r} in {root} is not UTF-8; rename the file") from None


def list_split(folder: Path, root: Path, empty_ok: bool = False) -> Listing:
    """The images of one split, in class folders, or flat where the archive's list tells their classes.

    Raises UserError where there are neither, for an empty class folder (both unless `empty_ok`), and for a flat image
    without a label.
    """
    walk = _Walk(root)
    try:
        flat, folders = walk.read(folder)
        names: list[str] = []
        synsets: list[str] = []
        for synset in folders:
            of_class = walk.tree(folder / synset)
            if not of_class and not empty_ok:
                raise UserError(f"class folder {folder / synset} holds no image; fill it or remove it")
            names += of_class
            synsets += [synset] * len(of_class)
        solution = imagenet.find_list(root, imagenet.VAL_SOLUTION)
        unlabeled = [os.path.relpath(folder / name, root) for name in flat]
        if unlabeled and solution is not None and folder.name != "train":
            walk.record_mtime(solution)
            found = imagenet.read_val_solution(solution)
            unlisted = [file for file in flat if Path(file).stem not in found]
            if unlisted:
                raise UserError(
                    f"image {folder / unlisted[0]} has no row in {solution}; remove it or fetch the CSV again"
                )
            names += unlabeled
            synsets += (found[Path(file).stem] for file in flat)
            unlabeled = []
    except OSError as error:
        raise UserError(f"can't read {error.filename} ({error.strerror}); fix that or give another root") from error
    if not names and not empty_ok:
        remedy = f"or {imagenet.VAL_SOLUTION} beside it" if unlabeled and folder.name != "train" else "instead"
        what = "images but no class folders" if unlabeled else "no class folders"
        raise UserError(f"{folder} holds {what}; expected {folder}/CLASS/IMAGE {remedy}".removesuffix(" instead"))
    _check_names(names, root)
    classes = sorted(set(synsets))
    number = {synset: label for label, synset in enumerate(classes)}
    labels = np.fromiter((number[synset] for synset in synsets), np.int32, len(synsets))
    if names and (np.diff(labels) < 0).any():  # flat images: put each into its class, where valprep would
        order = sorted(range(len(names)), key=lambda i: (labels[i], names[i].rpartition("/")[2]))
        names, labels = [names[i] for i in order], labels[order]
    return Listing(names, classes, labels, walk.mtimes)
