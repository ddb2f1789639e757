"""The images of Hugging Face parquet files, by row: every one decoded once, row group by row group, on all cores."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.dataset.imagenet import SYNSET
from pipeline.dataset.index.decode import FileContent, ScannedFile, inspect
from pipeline.dataset.index.index import RECORD, Index, has_index, is_current, open_index
from pipeline.dataset.index.left_out import Tally, kind_of
from pipeline.dataset.index.listing import Listing
from pipeline.dataset.index.scan import UNREADABLE
from pipeline.dataset.index.scan_journal import ScanJournal, member_key
from pipeline.dataset.index.tar_listing import TarSplit, drop_unlabeled, make_listings
from pipeline.dataset.index.tar_members import Member
from pipeline.dataset.index.write import write_index
from pipeline.dataset.workers import map_in_order
from pipeline.errors import TransientError, UserError
from pipeline.files import atomic_write
from pipeline.progress import Progress

_LABELS = ("label", "labels", "cls", "class", "fine_label", "target")


class Group(NamedTuple):
    """A row group: the file, its number there, the rows before it, and the columns of bytes, paths and labels."""

    path: str
    number: int
    first: int
    rows: int
    image: str
    name: str | None
    label: str


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(
            f"parquet files require pyarrow ({error}); install it with: pip install 'imagenet-pipeline[parquet]'"
        ) from None
    return parquet


def _open_groups(path: Path) -> tuple[list[Group], list[str]]:
    """The row groups of a file, and the names of its classes by number, empty where it has none."""
    parquet = _parquet()
    import pyarrow as pa

    with path.open("rb"):  # a missing permission is no damage
        pass
    try:
        file = parquet.ParquetFile(path)
        schema = file.schema_arrow
        fields = {field.name: field.type for field in schema}
        of_struct = [n for n, kind in fields.items() if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
        of_bytes = [n for n, kind in fields.items() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)]
        label = next((name for name in _LABELS if name in fields), None)
        if not (of_struct or of_bytes) or label is None:
            raise UserError(
                f"{path} has the columns {', '.join(fields)}; expected one of image bytes and label, as "
                "Hugging Face's image data sets have them"
            )
        image = f"{of_struct[0]}.bytes" if of_struct else of_bytes[0]
        has_path = of_struct and fields[of_struct[0]].get_field_index("path") >= 0
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        words = about.get("info", {}).get("features", {}).get(label, {}).get("names", [])
        groups, first = [], 0
        for number in range(file.num_row_groups):
            rows = file.metadata.row_group(number).num_rows
            name = f"{of_struct[0]}.path" if has_path else None
            groups.append(Group(str(path), number, first, rows, image, name, label))
            first += rows
        return groups, [str(word) for word in words]
    except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} can't be read as parquet ({error}); download it again") from error


def read_column(group: Group, name: str) -> list:
    """The values of a column, such as `image.bytes`."""
    import pyarrow as pa

    try:
        values = _parquet().ParquetFile(group.path).read_row_group(group.number, columns=[name]).column(0)
        inner = name.partition(".")[2]
        found = values.to_pylist()
        return [value[inner] if isinstance(value, dict) else value for value in found] if inner else found
    except (pa.ArrowException, OSError) as error:
        raise TransientError(f"{group.path} can't be read ({error}); run the same command again") from error


def _list_group(group: Group) -> list[Member]:
    """The rows of a group, without their images."""
    names = read_column(group, group.name) if group.name else [None] * group.rows
    members = []
    for row, (path, label) in enumerate(zip(names, read_column(group, group.label), strict=True), group.first):
        name = (path or "").rpartition("/")[2]
        if not name or not name.isprintable():
            name = f"{Path(group.path).stem}-{row:07d}.jpg"
        known = [part for part in name.replace(".", "_").replace("-", "_").split("_") if SYNSET.fullmatch(part)]
        none = label is None or (isinstance(label, int) and label < 0)
        members.append(Member(name, row, 0, None if none else str(label), known[-1] if known else "", ""))
    return members


def _inspect_group(task: tuple[Group, int, list[int]]) -> list[ScannedFile]:
    """Decode some rows of a group."""
    group, mtime_ns, rows = task
    data = read_column(group, group.image)
    empty = FileContent(b"", mtime_ns, "no bytes in its row")
    found = ((data[row - group.first] or b"") for row in rows)
    return [inspect(FileContent(bytes_of, mtime_ns) if bytes_of else empty) for bytes_of in found]


def scan_parquet(
    root: Path, files: dict[str, tuple[Path, ...]], folder: Path, processes: int
) -> tuple[Index, list[Group]]:
    """The index of parquet files, in `folder`: a record's shard is a file, its offset a row."""
    groups: list[Group] = []
    words: list[str] = []
    splits = {}
    for split, paths in files.items():
        members: list[tuple[int, Member]] = []
        for number, path in enumerate(paths):
            own, names = _open_groups(path)
            groups += own
            words = words or names
            members += [(number, member) for listed in map(_list_group, own) for member in listed]
        mtimes = {os.path.relpath(path, root): path.stat().st_mtime_ns for path in paths}
        splits[split] = TarSplit(paths, members, Tally(), mtimes)
        drop_unlabeled(splits[split], root)
        if not members:
            raise UserError(f"{paths[0]} has no labeled row; it may be a test split: leave it out")
    folder.mkdir(parents=True, exist_ok=True)
    if has_index(folder):
        index = open_index(folder)
        if is_current(index, [path for paths in files.values() for path in paths]):
            return index, groups
    listings = make_listings(splits, root, words)
    classes = listings["train"].classes
    unknown = sorted(set(listings["val"].classes) - set(classes))
    if unknown:
        raise UserError(f"{files['val'][0]} has the class '{unknown[0]}' that {files['train'][0]} does not have")
    journal = ScanJournal(folder / "scan.journal")
    made: dict[str, tuple[np.ndarray, Sequence[str]]] = {}
    bad = {}
    for split, listing in listings.items():
        made[split], bad[split] = _scan_split(root, split, listing, groups, journal, processes)
        made[split][0]["label"] = np.searchsorted(classes, listing.classes)[made[split][0]["label"]]
    left_out = {}
    for split, listing in listings.items():
        tally = Tally()
        for entry in bad[split]:
            tally.add(kind_of(entry["reason"]), entry["file"])
        left_out[split] = (tally + listing.left_out).reasons
    atomic_write(folder / UNREADABLE, json.dumps(bad, indent=1))
    noted = {name: mtime for listing in listings.values() for name, mtime in listing.mtimes.items()}
    shards = {split: listing.places.shards for split, listing in listings.items() if listing.places}
    named = [(name, name) for name in classes]
    index = write_index(folder, root, named, made, dict(shards), noted, left_out)
    journal.close(remove=True)
    return index, groups


def _scan_split(
    root: Path, split: str, listing: Listing, groups: list[Group], journal: ScanJournal, processes: int
) -> tuple[tuple[np.ndarray, list[str]], list[dict]]:
    places = listing.places
    assert places is not None
    records = np.zeros(len(listing.names), RECORD)
    records["label"], records["shard"], records["offset"] = listing.labels, places.shard, places.offset
    item_of = {(places.shards[s], row): i for i, (s, row) in enumerate(zip(places.shard, places.offset, strict=True))}
    keep, bad = np.ones(len(records), bool), []

    def take(i: int, seen: ScannedFile) -> None:
        record = records[i]
        record["size"], record["digest"] = seen.size, seen.digest
        record["width"], record["height"] = seen.width, seen.height
        if seen.reason:
            keep[i] = False
            entry = {"file": listing.describe(i), "class": listing.classes[listing.labels[i]], "reason": seen.reason}
            bad.append(entry | {"size": seen.size, "mtime_ns": seen.mtime_ns})

    tasks: list[tuple[Group, int, list[int]]] = []
    for group in groups:
        shard = os.path.relpath(group.path, root)
        if shard not in places.shards:
            continue
        mtime, todo = listing.mtimes[shard], []
        for row in range(group.first, group.first + group.rows):
            i = item_of.get((shard, row))
            seen = journal.seen.get(member_key(shard, row))
            if i is not None and seen is not None and seen.mtime_ns == mtime:
                take(i, seen)
            elif i is not None:
                todo.append(row)
        if todo:
            tasks.append((group, mtime, todo))
    total = sum(len(rows) for _, _, rows in tasks)
    with Progress(f"Reading {split}", total, "images", quiet=not total) as progress:
        results = map_in_order(_inspect_group, tasks, min(processes, max(1, len(tasks))))
        for (group, _, rows), found in zip(tasks, results, strict=True):
            shard = os.path.relpath(group.path, root)
            for row, seen in zip(rows, found, strict=True):
                take(item_of[shard, row], seen)
            journal.add([member_key(shard, row) for row in rows], found)
            progress.advance(len(rows))
    return (records[keep], [listing.names[i] for i in np.flatnonzero(keep)]), bad
