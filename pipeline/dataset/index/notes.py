"""Notes on an index for people: the images that it leaves out, and class folders that may hold several classes."""

import json
from pathlib import Path, PurePath

from pipeline.counts import count
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.left_out import describe
from pipeline.errors import UserError

UNREADABLE_FILE = "unreadable.json"  #: in an index folder: the images that the scan could not read


def read_unreadable(folder: Path) -> dict[str, list[dict]]:
    """Split -> image files that the scan left out: {"file", "class", "reason", "size", "mtime_ns"}, and of one in a
    tar file "tar" and "offset"."""
    path = folder / UNREADABLE_FILE
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); remove {folder} and index again") from error


def left_out_lines(index: Index) -> list[str]:
    """What is said of an index that leaves something out: a line for each split; without a line where all is in."""
    named = sum(map(len, read_unreadable(index.folder).values()))
    see = f"; unreadable files are named in {index.folder / UNREADABLE_FILE}" if named else ""
    lines = [describe(index.left_out, [split]) for split in index.left_out]
    return [f"left out of {line}{see}" for line in lines if line]


def nested_lines(index: Index) -> list[str]:
    """A line where class folders hold several folders each: these may be meant as classes, and are none."""
    classes = set(index.synsets)
    inside: dict[str, set[str]] = {}
    for folder in map(PurePath, index.folders):
        above = [parent for parent in folder.parents if str(parent) in index.folders]
        if len(above) == 2 and folder.parent.name in classes:  # a class folder, and that of its split
            inside.setdefault(folder.parent.name, set()).add(folder.name)
    several = sorted(name for name, folders in inside.items() if len(folders) > 1)
    if not several:
        return []
    first = several[0]
    return [
        f"{count(len(several), 'class folder')} with folders inside: the images of {first}/{min(inside[first])} and "
        f"{first}/{max(inside[first])} count as class {first}; if these are classes, move them up, beside {first}"
    ]
