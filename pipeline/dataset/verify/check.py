"""Are the bytes of every sample those that were indexed, and what is odd about them? With all cores.

A digest that agrees proves more than a decode: these very bytes were decoded in full when they were indexed.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash

from pipeline.counts import count
from pipeline.dataset.index.decode import decode_fully
from pipeline.dataset.index.index import Split
from pipeline.dataset.shards.in_place import sample_frame
from pipeline.dataset.shards.restart import make_entry, table_name
from pipeline.dataset.workers import map_in_order, read_ahead
from pipeline.errors import TransientError

CHUNK = 128  # samples a task
MISSING = "missing"
Tag = TypeVar("Tag")
_GONE = (FileNotFoundError, NotADirectoryError)


class Item(NamedTuple):
    """One sample to look at. `offset` is -1 for a file of its own; `digest` is None where nothing was indexed. `table`,
    `entry`: a shard's restart table, and where the sample's entry lies in it (offset and bytes). `member`, `label`: of
    a sample in a shard that `pack` wrote."""

    path: str
    offset: int
    size: int
    digest: int | None
    table: str = ""
    entry: tuple[int, int] = (0, 0)
    member: str = ""
    label: int = -1


class Finding(NamedTuple):
    """`problem`: empty, `MISSING`, or what is wrong; `kind`: of a sound image, "png", "grayscale",
    "cmyk", "other" (neither JPEG nor PNG), or empty: a JPEG in color."""

    problem: str
    kind: str = ""


def image_kind(data: bytes) -> str:
    """The `Finding.kind` of an image, from the file's first markers alone (JPEG: ITU T.81, B.2)."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:2] != b"\xff\xd8":
        return "other"
    at = 2
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            return ""
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            return {1: "grayscale", 4: "cmyk"}.get(data[at + 9], "")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return ""


def read_item(item: Item) -> bytes | Finding:
    """A sample's bytes, or what is wrong where there are none. TransientError where the disk fails."""
    try:
        with open(item.path, "rb") as file:  # noqa: PTH123 - one call a file, 1.28 M times
            if item.offset < 0:
                return file.read()
            return os.pread(file.fileno(), item.size, item.offset)
    except _GONE:
        return Finding(MISSING)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return Finding(MISSING)
        if isinstance(error, PermissionError | IsADirectoryError):
            return Finding(f"can't be read ({error.strerror})")
        raise TransientError(f"can't read {item.path} ({error.strerror}); run the same command again") from error


def check_item(item: Item, data: bytes, decode: bool) -> Finding:
    """Judge a sample's bytes; decode them if `decode` or if the sample was never indexed."""
    if item.digest is not None and len(data) != item.size:
        return Finding(f"has {count(len(data), 'byte')} instead of {item.size:,}" if data else "is empty")
    if item.digest is not None and xxhash.xxh3_64_intdigest(data) != item.digest:
        return Finding("bytes differ from those indexed")
    if item.member and not _are_headers_sound(item, data):
        return Finding("its headers or its label in the shard are damaged; the image is not")
    if item.table and not _is_entry_sound(item, data):
        return Finding("its restart table is missing or damaged, or does not fit the shard")
    if decode or item.digest is None:
        try:
            decode_fully(data)
        except (OSError, ValueError) as error:
            return Finding(f"does not decode: {error}")
    return Finding("", image_kind(data))


def _are_headers_sound(item: Item, data: bytes) -> bool:
    """Do the image's header, and its label behind it, stand in the shard as they were written?"""
    before, after = sample_frame(*item.member.rpartition(".")[::2], data, item.label)
    try:
        with open(item.path, "rb") as file:  # noqa: PTH123 - one call a sample
            start, stop = item.offset - len(before), item.offset + item.size
            found = (os.pread(file.fileno(), len(part), at) for part, at in ((before, start), (after, stop)))
            return tuple(found) == (before, after)
    except OSError as error:
        raise TransientError(f"can't read {item.path} ({error.strerror}); run the same command again") from error


def _is_entry_sound(item: Item, data: bytes) -> bool:
    """Is the sample's entry in the restart table the one that its bytes give?"""
    offset, size = item.entry
    assert item.digest is not None
    if not size:
        return make_entry(data, item.digest) is None
    try:
        with open(item.table, "rb") as file:  # noqa: PTH123 - one call a sample
            entry = os.pread(file.fileno(), size, offset)
    except _GONE:
        return False
    except OSError as error:
        raise TransientError(f"can't read {item.table} ({error.strerror}); run the same command again") from error
    return entry == make_entry(data, item.digest)


def _check_all(task: tuple[list[Item], bool]) -> list[Finding]:
    items, decode = task
    read = zip(items, read_ahead(read_item, items), strict=True)
    return [found if isinstance(found, Finding) else check_item(item, found, decode) for item, found in read]


@dataclass(frozen=True)
class NamedSample:
    """A finding worth naming: split, name (path or member), synset, file stem, and the finding."""

    split: str
    name: str
    synset: str
    stem: str
    problem: str


def iter_samples(split: Split) -> Iterator[tuple[int, str]]:
    """(sample, name) in the order in which the bytes lie, so that shards are read front to back."""
    if not split.shards:
        yield from enumerate(split.iter_names())
        return
    for i in np.lexsort((split.records["offset"], split.records["shard"])).tolist():
        yield i, split.name(i)


def make_item(split: Split, sample_id: int, name: str, is_packed: bool = False) -> Item:
    """is_packed: this project wrote the shards."""
    record = split.records[sample_id]
    shard = int(record["shard"])
    place = name if shard < 0 else split.shards[shard]
    offset = -1 if shard < 0 else int(record["offset"])
    item = Item(f"{split.root}/{place}", offset, int(record["size"]), int(record["digest"]))
    if shard >= 0 and is_packed:
        item = item._replace(member=name, label=int(record["label"]))
    if shard < 0 or split.restart is None:
        return item
    of = split.restart[sample_id]
    return item._replace(
        table=f"{split.root}/{table_name(place)}", entry=(int(of["table_offset"]), int(of["table_size"]))
    )


def new_item(root: Path, name: str) -> Item:
    """A file that is in no index: it is decoded."""
    return Item(f"{root}/{name}", -1, 0, None)


def check_items(
    items: Iterator[tuple[Tag, Item]], decode: bool, processes: int, advance: Callable[[int], None]
) -> Iterator[tuple[Tag, Finding]]:
    """(tag, finding) of each (tag, item), in order."""

    def chunks() -> Iterator[list[tuple[Tag, Item]]]:
        chunk = []
        for pair in items:
            chunk.append(pair)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    waiting: list[list[Tag]] = []

    def tasks() -> Iterator[tuple[list[Item], bool]]:
        for chunk in chunks():
            waiting.append([tag for tag, _ in chunk])
            yield [item for _, item in chunk], decode

    for findings in map_in_order(_check_all, tasks(), processes):
        yield from zip(waiting.pop(0), findings, strict=True)
        advance(len(findings))
