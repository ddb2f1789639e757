"""Names that deceive: leftovers of other programs, links that lead nowhere, and names that look the same and differ, as
Unicode writes "é" as one character (NFC) or as two (NFD)."""

import errno
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

#: Names, in lower case, that systems and programs leave in folders; so is every name that begins with a dot, such as
#: `.ipynb_checkpoints`, `._image.jpg`, `.Trash-1000` and `.snapshot`.
FOREIGN_NAMES = frozenset(
    {
        *("__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "recycler", "recycled"),
        *("lost+found", "found.000", "~snapshot", "__pycache__", "ehthumbs.db", "icon\r"),
        *("network trash folder", "temporary items", "thevolumesettingsfolder", "@synoresource", "@synoeastream"),
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "@tmp"),
    }
)


_SPLIT_WORDS = {
    "train": re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)"),
    "val": re.compile(r"(^|[^a-z])(val|valid|validation|eval)([^a-z]|$)"),
    "test": re.compile(r"(^|[^a-z])test([^a-z]|$)"),
}

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  #: what stands in place of a file that was not fetched


def is_foreign(name: str) -> bool:
    """Is a file or folder of this name a leftover of a system or program, and no part of a data set?"""
    return name[0] == "." or name.lower() in FOREIGN_NAMES


def split_of(name: str) -> str:
    """The split ("train", "val", "test") that a word of a file's or folder's name gives; empty where none does."""
    return next((split for split, word in _SPLIT_WORDS.items() if word.search(name.lower())), "")


def form(name: str) -> str:
    """How a name is written: "NFC" (composed, as Linux and Windows do), "NFD" (as macOS does), or "mixed"."""
    return next((kind for kind in ("NFC", "NFD") if unicodedata.is_normalized(kind, name)), "mixed")


def twin_of(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that looks like `name` but is written in other characters; None where there is none."""
    if name.isascii():
        return None
    wanted = unicodedata.normalize("NFC", name)
    return next((other for other in names if other != name and unicodedata.normalize("NFC", other) == wanted), None)


def distinguish(name: str, other: str) -> str:
    """The rest of a sentence on two names that look the same."""
    return (
        f"written as {form(name)} ({name!a}), which looks like {form(other)} ({other!a}) and is another name;"
        " rename one, e.g. with: convmv -f utf8 -t utf8 --nfc -r --notest DIR"
    )


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Is it a folder, or a link to one? A link to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def is_device(entry: "os.DirEntry[str]") -> bool:
    """Is what is no folder a pipe, a socket or a device, or a link to one? Reading it may never end."""
    try:
        return not entry.is_file() and Path(entry.path).exists()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def dead_link(path: Path) -> str | None:
    """ "PATH is a link to TARGET, which is not there"; None where `path` is no such link. Raises PermissionError."""
    return (
        f"{path} is a link to {path.readlink()}, which is not there"
        if path.is_symlink() and not path.exists()
        else None
    )
