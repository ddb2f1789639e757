"""Sort the validation images into class folders, offline, from the archive's own lists.

The result is the layout of the well-known valprep.sh: a folder for each of the 1,000 synsets with its 50 images. Each
image is moved by one rename, so a kill at any moment leaves every image complete; the same command resumes.
"""

import errno
import filecmp
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.command import run_command
from pipeline.counts import count
from pipeline.dataset import imagenet
from pipeline.dataset.disk import explain
from pipeline.dataset.index.listing import IMAGE_SUFFIXES
from pipeline.dataset.layouts.find import find_val_folder
from pipeline.dataset.layouts.labels import TINY_LIST, find_val_labels
from pipeline.dataset.names import is_foreign
from pipeline.errors import UserError
from pipeline.progress import Progress

ANNOTATIONS = Path("ILSVRC/Annotations/CLS-LOC/val")
_OBJECT = re.compile(r"<object>\s*<name>\s*(n\d{8})\s*</name>")


@dataclass(frozen=True)
class SortResult:
    """Result of a run: images moved, images already in place, class folders, and the source of the labels."""

    moved: int
    already: int
    folders: int
    source: Path


def read_val_annotations(folder: Path) -> dict[str, str]:
    """Image id -> synset of the first object, from the validation images' XML files. UserError where one has none."""
    labels = {}
    for path in folder.glob("*.xml"):
        match = _OBJECT.search(path.read_text(encoding="utf-8", errors="replace"))
        if match is None:
            raise UserError(f"{path} names no object's synset; fetch it again, or {imagenet.VAL_SOLUTION}")
        labels[path.stem] = match[1]
    return labels


def read_any_val_labels(root: Path, folder: Path | None = None) -> tuple[dict[str, str], Path]:
    """(image id -> class, its source): from a list (`layouts.labels`), else from the archive's annotations; empty where
    there is neither. folder: the validation images; default: ROOT/val."""
    root = root.resolve()
    found = find_val_labels(root, folder or root / "val")
    if found is not None:
        return found.labels, found.source
    return read_val_annotations(root / ANNOTATIONS), root / ANNOTATIONS


def read_val_labels(root: Path, folder: Path) -> tuple[dict[str, str], Path]:
    """`read_any_val_labels`; UserError where there are none."""
    labels, source = read_any_val_labels(root, folder)
    if not labels:
        raise UserError(
            f"{root} holds neither {imagenet.VAL_SOLUTION} nor {ANNOTATIONS} (both of Kaggle), nor {TINY_LIST} "
            "(Tiny-ImageNet), nor ILSVRC2012_devkit_t12 (image-net.org); put one of them there"
        )
    return labels, source


def _folders(folder: Path) -> list[Path]:
    """The folder and all below it, also those that an archive brought along; no leftovers of other programs."""
    found = [folder]
    for place in found:  # grows in the loop
        below = (path for path in place.iterdir() if not is_foreign(path.name) and path.is_dir())
        seen = {path.resolve() for path in found}
        found += sorted(path for path in below if path.resolve() not in seen)
    return found


def _move(path: Path, target: Path) -> None:
    """Rename; where a link leads to another disk, copy and remove."""
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = target.with_name(f".{target.name}.part")
        shutil.copy2(path, part)
        part.replace(target)
        path.unlink()


def sort_val(root: Path, quiet: bool = True) -> SortResult:
    """Move each validation image into its class's folder; what lies right stays.

    An image in the wrong folder is moved as well, and one that lies flat replaces its namesake in the folder: it was
    fetched later. Raises UserError for an image without a label, before anything is moved.
    """
    folder = find_val_folder(root)
    labels, source = read_val_labels(root, folder)
    moves, already = [], 0
    try:
        homes = _folders(folder)
        for home in homes:
            for path in home.iterdir():
                if is_foreign(path.name) or path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                if path.stem not in labels:
                    raise UserError(f"image {path} has no label in {source}; remove it or fetch the list again")
                synset = labels[path.stem]
                if home == folder / synset:
                    already += 1
                else:
                    moves.append((path, folder / synset / path.name))
        if not moves and not already:
            raise UserError(f"{folder} holds no image; fetch the validation images first")
        targets = sorted({target.parent for _, target in moves})
        for target in targets:
            target.mkdir(exist_ok=True)
        with Progress("Sorting", len(moves), "images", quiet=quiet or not moves) as progress:
            for path, target in sorted(moves):
                if path.parent == folder or not target.exists():
                    _move(path, target)
                elif filecmp.cmp(path, target, shallow=False):
                    path.unlink()  # a misplaced copy of what lies right
                else:
                    raise UserError(
                        f"{path} and {target} differ; look at both, remove the damaged one, and run it again"
                    )
                progress.advance()
        for home in sorted(homes[1:], reverse=True):  # the deepest first
            if not home.is_symlink() and not any(home.iterdir()):
                home.rmdir()  # emptied by a move
    except OSError as error:
        raise explain(error, error.filename or folder) from error
    folders = sum(path.is_dir() for path in folder.iterdir())
    return SortResult(len(moves), already, folders, source)


def valprep(root: str) -> int:
    """Sort ImageNet's validation images into class folders, from the archive's own lists.

    Args:
        root: data root, which holds ILSVRC/ and LOC_val_solution.csv.
    """
    done = sort_val(Path(root), quiet=False)
    total = done.moved + done.already
    print(
        f"{find_val_folder(Path(root))}: {count(total, 'image')} in {count(done.folders, 'class folder')} "
        f"({done.moved:,} moved now, labels from {done.source.name})"
    )
    return 0


def main(argv: list[str]) -> int:
    return run_command(valprep, "valprep", argv)
