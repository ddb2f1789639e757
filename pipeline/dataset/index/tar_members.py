"""The samples of tar files that others made, by place: nothing is unpacked, and of the images no byte is read.

A WebDataset sample is the members that share a key (their path up to the first dot of the file's name), in any order:
an image, and its label in `.cls` or `.json`. In a tar without labels every image is a sample.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.dataset.imagenet import SYNSET
from pipeline.dataset.index.label_text import label_text
from pipeline.dataset.index.left_out import FOREIGN, Tally
from pipeline.dataset.names import LFS_POINTER, is_foreign
from pipeline.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")  #: suffixes, the preferred one first
NO_IMAGE = "samples without an image"
NO_LABEL = "samples without a label"
MORE_IMAGES = "further images of a sample"
LINKS = "links or other special members"
_LABELS = ("cls", "label", "class", "target", "json", "txt")  # suffixes, the preferred one first
_LABEL_KEYS = (
    *("label", "cls", "class_id", "class_index", "class_idx", "label_id", "category_id", "target", "class", "wnid"),
    *("synset", "class_name", "label_name", "category"),
)
_MAGIC = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
_MOST_TEXT = 1 << 20  # bytes of a label's member that are read
_IN_NAME = re.compile(r"(?<![0-9A-Za-z])n\d{8}(?!\d)")


class Part(NamedTuple):
    """A tar to be walked: the file, or the `size` bytes of it at `start` that are a tar themselves (0: to the end).
    `label`: the class of all its images; empty: its members tell."""

    path: str
    start: int = 0
    size: int = 0
    label: str = ""


class Member(NamedTuple):
    """An image in a tar file. offset, size: of its bytes. label: what the tar says, None where it says nothing.
    hint: a synset in its name or beside its label, else empty. folder: the name of the folder above, else empty."""

    name: str
    offset: int
    size: int
    label: str | None
    hint: str
    folder: str


@dataclass
class Walked:
    """What a tar holds. suffixes: of all its members, at most a hundred; cut: it has no end mark."""

    members: list[Member] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)
    left_out: Tally = field(default_factory=Tally)
    cut: bool = False


@dataclass
class _Sample:
    first: str  # name of its first member
    images: list[tuple[str, str, int, int]] = field(default_factory=list)  # suffix, name, offset, size
    texts: dict[str, bytes] = field(default_factory=dict)  # suffix -> content
    suffixes: set[str] = field(default_factory=set)


def iter_members(tar: tarfile.TarFile, end: int = 0) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar, none of them kept; they end at the byte `end` of the file (0: where the tar does).

    Raises ReadError for a damaged header: `tarfile` itself takes one behind the first member for the end.
    """
    while (not end or tar.offset < end) and (info := tar.next()) is not None:
        vars(tar)["members"].clear()  # it would keep a million of them
        info.name = info.name.removeprefix("./")
        yield info
    if not end or tar.offset < end:
        file: Any = tar.fileobj
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"damaged header at byte {tar.offset:,}")


def find_parts(path: str) -> list[Part]:
    """The tars of a tar of one tar a class, such as `ILSVRC2012_img_train.tar`. UserError where it holds others, or is
    damaged or cut."""
    parts = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in iter_members(tar):
                if info.isdir():
                    continue
                synset, _, suffix = info.name.rpartition(".")
                if suffix != "tar" or not info.isreg() or not SYNSET.fullmatch(synset):
                    raise UserError(f"{path} holds {info.name!r}, where a tar of a class was expected: archive refused")
                parts.append(Part(path, info.offset_data, info.size, synset))
            if lacks_end(tar.fileobj, tar.offset):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, error) from error
    return parts


def _damaged(path: str, error: Exception | str) -> UserError:
    with open(path, "rb") as file:  # noqa: PTH123 - a path as text
        head = file.read(512)
    kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
    if kind is not None:
        return UserError(
            f"{path} is compressed ({kind}), which can't be read in place; decompress it to a plain tar file"
        )
    if head.startswith(LFS_POINTER):
        return UserError(f"{path} is a pointer of Git LFS, not the file itself; run in its folder: git lfs pull")
    if head.lstrip()[:1] == b"<":
        return UserError(f"{path} holds a web page, not a tar file; get that file again")
    return UserError(f"{path} is cut or damaged ({error}); get that file again")


def walk(part: Part) -> Walked:
    """List the samples of a tar. UserError where it is damaged or cut, OSError where it can't be read."""
    found, end = Walked(), part.start + part.size if part.size else 0
    samples: list[_Sample] = []
    newest: dict[str, _Sample] = {}
    try:
        with open(part.path, "rb") as file:  # noqa: PTH123 - a path as text
            file.seek(part.start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in iter_members(tar, end):
                    if info.isdir():
                        continue
                    pieces = info.name.split("/")
                    if info.name.startswith("/") or ".." in pieces or not info.name.isprintable():
                        raise UserError(f"{part.path} holds the name {info.name!r}: archive refused")
                    if any(map(is_foreign, filter(None, pieces))):
                        found.left_out.add(FOREIGN, info.name)
                    elif not info.isreg() or info.issparse():
                        found.left_out.add(LINKS, info.name)
                    else:
                        _take(info, tar, samples, newest)
                        if len(found.suffixes) < 100:
                            found.suffixes.add(Path(info.name).suffix.lower() or info.name)
                found.cut = not end and lacks_end(file, tar.offset)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise _damaged(part.path, error) from error
    for sample in samples:
        _finish(part, sample, found)
    return found


def lacks_end(file: Any, offset: int) -> bool:
    """Is there nothing behind the last member, which ends at `offset`?"""
    file.seek(offset)
    return not file.read(1)


def _take(info: tarfile.TarInfo, tar: tarfile.TarFile, samples: list[_Sample], newest: dict[str, _Sample]) -> None:
    """Add a member to its sample; a key whose suffix comes again begins a new one."""
    folder, slash, file = info.name.rpartition("/")
    stem, _, suffix = file.partition(".")
    key, suffix = f"{folder}{slash}{stem}", suffix.lower()
    sample = newest.get(key)
    if sample is None or suffix in sample.suffixes:
        sample = newest[key] = _Sample(info.name)
        samples.append(sample)
    sample.suffixes.add(suffix)
    kind = suffix.rpartition(".")[2]
    if kind in IMAGES:
        sample.images.append((suffix, info.name, info.offset_data, info.size))
    elif kind in _LABELS and info.size <= _MOST_TEXT:
        content = tar.extractfile(info)
        assert content is not None
        sample.texts["cls" if suffix in ("cls.txt", "label.txt", "class.txt") else suffix] = content.read()


def _finish(part: Part, sample: _Sample, found: Walked) -> None:
    """The member that a sample is, or why it is none."""
    label, hint = read_label(sample.texts)
    label = part.label or label
    if not sample.images:
        if sample.texts and label is not None:
            found.left_out.add(NO_IMAGE, sample.first)
        return
    images = sorted(sample.images, key=lambda image: (image[0].count("."), IMAGES.index(image[0].rpartition(".")[2])))
    if label is not None and not part.label:
        for _, name, _, _ in images[1:]:
            found.left_out.add(MORE_IMAGES, name)
        images = images[:1]
    for _, name, offset, size in images:
        above, _, file = name.rpartition("/")
        known = _IN_NAME.findall(file)
        folder = above.rpartition("/")[2]
        hint_of = hint or (known[-1] if known else folder if SYNSET.fullmatch(folder) else "")
        found.members.append(Member(name, offset, size, label, hint_of, folder))


def read_label(texts: dict[str, bytes]) -> tuple[str | None, str]:
    """(label, synset) that the members of a sample tell, suffix -> content; None and empty where they do not."""
    label, hint = None, ""
    for suffix in _LABELS:
        if suffix not in texts:
            continue
        if suffix == "json":
            value, of_json = _from_json(texts[suffix])
            label, hint = label if label is not None else value, hint or of_json
            continue
        text = label_text(texts[suffix])
        if label is None and text and (suffix != "txt" or text.isdigit() or SYNSET.fullmatch(text)):
            label = text
    return label, hint


def _from_json(content: bytes) -> tuple[str | None, str]:
    try:
        value = json.loads(content.decode("utf-8-sig", "replace").strip().strip("\0"))
    except (ValueError, RecursionError):
        return None, ""
    hint = ""
    if isinstance(value, dict):
        texts = [item for item in value.values() if isinstance(item, str)]
        named = {item for item in texts if SYNSET.fullmatch(item)} or {
            known for item in texts if " " not in item for known in _IN_NAME.findall(item.rpartition("/")[2])[-1:]
        }
        hint = named.pop() if len(named) == 1 else ""
        value = next((value[key] for key in _LABEL_KEYS if value.get(key) is not None), None)
    return label_text(value), hint
