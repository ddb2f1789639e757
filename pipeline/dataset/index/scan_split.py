"""Every image of one split looked at once, by all cores: what lies in files of its own, or in files of many."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.index.decode import ScannedFile, inspect_all, inspect_members
from pipeline.dataset.index.index import RECORD
from pipeline.dataset.index.listing import Listing
from pipeline.dataset.index.scan_journal import PreviousScan, ScanJournal, member_key
from pipeline.dataset.workers import map_in_order
from pipeline.progress import Progress

CHUNK = 64  # files a task
SMALL = 2 * CHUNK  # files, below which starting processes costs more than it saves

Place = tuple[str, int, int]  #: of an image in a file of many: that file, offset and bytes


@dataclass(frozen=True)
class Reader:
    """How images that lie in files of many are read. inspect: looks at some of one file or more, importable by name;
    unit_of: images of one unit are looked at together, whatever their number (None: there are no units)."""

    inspect: Callable[[list[Place]], list[ScannedFile]]
    unit_of: Callable[[Place], object] | None = None


IN_TARS = Reader(inspect_members)  #: of tar files


def _chunks(items: list, unit_of: Callable[[Any], object] | None = None) -> Iterator[list]:
    """`CHUNK` items at a time, or, where there are units, those of a unit that follow one another."""
    if unit_of is not None:
        for _, group in itertools.groupby(items, unit_of):
            yield list(group)
        return
    for i in range(0, len(items), CHUNK):
        yield items[i : i + CHUNK]


def scan_split(
    root: Path,
    split: str,
    listing: Listing,
    known: PreviousScan,
    journal: ScanJournal,
    processes: int,
    reader: Reader = IN_TARS,
) -> tuple[np.ndarray, list[str], list[dict]]:
    """Records [n], names and the unreadable files of one split; unchanged files are not read again.

    The label of a record is its number in `listing.classes`. reader: of files of many images.
    """
    records = np.zeros(len(listing.names), RECORD)
    records["label"], records["shard"] = listing.labels, -1
    places = listing.places
    if places is not None:
        records["shard"], records["offset"] = places.shard, places.offset
    keep, unreadable = np.ones(len(records), bool), []

    def take(i: int, seen: ScannedFile) -> None:
        if seen.reason:
            keep[i] = False
            entry: dict[str, str | int] = {"file": listing.describe(i)}
            entry |= {"class": listing.classes[listing.labels[i]], "reason": seen.reason}
            entry |= {"size": seen.size, "mtime_ns": seen.mtime_ns}
            if places is not None:
                entry |= {"tar": place(i)[0], "offset": place(i)[1], "digest": seen.digest}
            unreadable.append(entry)
            return
        record = records[i]
        record["size"], record["digest"] = seen.size, seen.digest
        record["mtime_ns"] = seen.mtime_ns if places is None else 0
        record["width"], record["height"] = seen.width, seen.height

    def place(i: int) -> Place:
        assert places is not None
        return places.shards[places.shard[i]], int(places.offset[i]), int(places.size[i])

    todo = []
    for i, name in enumerate(listing.names):
        seen = known.find(root, name) if places is None else known.find_member(*place(i), listing.mtimes[place(i)[0]])
        if seen is None:
            todo.append(i)
        else:
            take(i, seen)
    processes = 1 if len(todo) <= SMALL else processes
    results: Iterator[list[ScannedFile]]
    if places is None:
        chunks = list(_chunks(todo))
        results = map_in_order(
            inspect_all, ([f"{root}/{listing.names[i]}" for i in chunk] for chunk in chunks), processes
        )
    else:
        todo.sort(key=lambda i: place(i)[:2])  # files are read front to back
        unit_of = reader.unit_of
        chunks = list(_chunks(todo, None if unit_of is None else lambda i: unit_of(place(i))))
        members = ([(f"{root}/{shard}", *at) for shard, *at in map(place, chunk)] for chunk in chunks)
        results = map_in_order(reader.inspect, members, processes)  # type: ignore[arg-type]
    with Progress(f"Indexing {split}", len(todo), "images", quiet=not todo) as progress:
        for chunk, found in zip(chunks, results, strict=True):
            for i, seen in zip(chunk, found, strict=True):
                take(i, seen)
            keys = [listing.names[i] if places is None else member_key(*place(i)[:2]) for i in chunk]
            journal.add(keys, found)
            progress.advance(len(chunk))
    unreadable.sort(key=lambda entry: entry["file"])
    return records[keep], [listing.names[i] for i in np.flatnonzero(keep)], unreadable
