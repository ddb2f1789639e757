"""Hugging Face parquet files straight into tar shards: the bytes that `pack` makes from the same images in folders.

The files are read twice: to decode every image and to learn its size, then to put each where its shard has a place for
it. A kill costs the row groups at work. A shard whose images are made anew (smaller, with restart markers, mended) is
written from the one with the originals, which is removed then.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.dataset.disk import check_space, explain
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.scan import read_unreadable
from pipeline.dataset.lock import locked, try_lock
from pipeline.dataset.shards.format import (
    BLOCK,
    STATE,
    Sample,
    ShardWriter,
    find_complete,
    image_suffix,
    make_row,
    read_marker,
    shard_name,
    tar_header,
    temporary_path,
    whole_size,
    write_records,
)
from pipeline.dataset.shards.in_place import sample_members, write_in_place
from pipeline.dataset.shards.pack import make_task, pack_index, parse_part, refuse_foreign
from pipeline.dataset.shards.parquet_scan import File, group_of, open_file, read_rows, scan_parquet, stat_file
from pipeline.dataset.shards.plan import Options, Plan, make_key
from pipeline.dataset.shards.stage import list_shard_files
from pipeline.dataset.shards.write_shard import Task, fill_shard, open_source
from pipeline.dataset.workers import map_in_order
from pipeline.errors import UserError
from pipeline.limits import available_cores
from pipeline.progress import Progress

MARK = "parquet"  #: in the marker of the shards: file, relative to the root -> its bytes and its time


@dataclass(frozen=True)
class _Place:
    """Where a row's sample goes, and what it is. source: file, relative to the root, and row; shard: its number; start:
    byte there; header: bytes of the image's tar header; order: as of `Sample`."""

    source: tuple[str, int]
    shard: int
    start: int
    header: int
    key: str
    name: str
    label: int
    digest: int
    size: int
    shape: tuple[int, int]
    order: int


@dataclass(frozen=True)
class _Shard:
    """A shard to be made. size: bytes of its members, as they are in the source; task: how to make it from those; None
    where it keeps them."""

    dest: Path
    split: str
    number: int
    places: tuple[_Place, ...]
    size: int
    task: Task | None

    @property
    def temporary(self) -> Path:
        return temporary_path(self.dest, self.split, self.number)


def _deal(dest: Path, index: Index, plan: Plan, options: Options, todo: list[tuple[str, int]]) -> list[_Shard]:
    """The shards that are to be made."""
    unreadable = read_unreadable(index.folder)
    digests = {(entry["tar"], entry["offset"]): entry["digest"] for of in unreadable.values() for entry in of}
    shards = []
    for split, number in todo:
        of_split, end, places = index.splits[split], 0, []
        anew = options.side_of(split) is not None or options.restart is not None
        for item in plan.of_shard(split, number).tolist():
            if item < len(of_split):
                record, name, order = of_split.records[item], of_split.name(item), 2 * item + 1
                source = of_split.shards[record["shard"]], int(record["offset"])
                label, size, digest = int(record["label"]), int(record["size"]), int(record["digest"])
                shape = int(record["width"]), int(record["height"])
            else:
                extra, anew = plan.extras[split][item - len(of_split)], True
                assert extra.place is not None
                name, label, order, shape = extra.name, extra.label, extra.order, (0, 0)
                source, size = extra.place[:2], extra.place[2]
                digest = digests[source]
            key = make_key(index.synsets[label], name, item in plan.twins[split])
            header = len(tar_header(f"{key}.jpg", size))
            places.append(_Place(source, number, end, header, key, name, label, digest, size, shape, order))
            text = len(tar_header(f"{key}.cls", len(str(label)))) + BLOCK
            end += header + size + -size % BLOCK + text
        task = make_task(dest, index, plan, options, split, number) if anew else None
        shards.append(_Shard(dest, split, number, tuple(places), end, task))
    return shards


def _members(place: _Place, data: bytes) -> bytes:
    """A sample as it stands in its shard."""
    suffix = image_suffix(data, place.name)
    if len(tar_header(f"{place.key}.{suffix}", len(data))) != place.header:
        file, row = place.source
        raise UserError(
            f"row {row:,} of {file} has too long an image name for a tar header ({place.name}); write that file again "
            "with a shorter path in this row"
        )
    return sample_members(place.key, suffix, data, place.label)


@dataclass(frozen=True)
class _Group:
    """The rows of a row group that are to be written: split, and the place of each, by row."""

    path: str
    row_group: int
    dest: Path
    rows: dict[int, tuple[str, _Place]]


def _write_group(group: _Group) -> int:
    """Put rows of a group into their places; returns how many."""
    file = open_file(group.path)
    for row, found in enumerate(read_rows(group.path, file.image, group.row_group), file.firsts[group.row_group]):
        if row in group.rows:
            (split, place), data = group.rows[row], found or b""
            if len(data) != place.size or (data and xxhash.xxh3_64_intdigest(data) != place.digest):
                raise UserError(f"{group.path} has changed since it was read; run the same command again")
            write_in_place(group.dest, split, place.shard, _members(place, data), place.start)
    return len(group.rows)


def _find_written(shard: _Shard) -> list[bool]:
    """Which samples of an unfinished shard are in their places, as a killed run left it."""
    if not shard.temporary.exists():
        return [False] * len(shard.places)
    found = []
    with shard.temporary.open("rb") as file:
        for place in shard.places:
            file.seek(place.start + place.header)
            data = file.read(place.size)
            same = not place.size or xxhash.xxh3_64_intdigest(data) == place.digest
            whole = _members(place, data) if same else b""
            file.seek(place.start)
            found.append(same and file.read(len(whole)) == whole)
    return found


def _finish_shard(shard: _Shard) -> int:
    """Check a shard from disk and give it its name; returns its samples."""
    if not all(_find_written(shard)):
        shard.temporary.unlink(missing_ok=True)
        raise UserError(f"{shard.temporary} does not hold what was written; check the disk, run the same command again")
    try:
        (_keep if shard.task is None else _make_anew)(shard)
    except OSError as error:
        raise explain(error, shard.temporary) from error
    return len(shard.places)


def _keep(shard: _Shard) -> None:
    rows, names = [], []
    with shard.temporary.open("r+b") as file:
        file.truncate(whole_size(shard.size))
        for place in shard.places:
            file.seek(place.start + place.header)
            data, (width, height) = file.read(place.size), place.shape
            suffix = image_suffix(data, place.name)
            sample = Sample(place.key, suffix, data, place.label, width, height, place.order)
            rows.append(make_row(sample, place.start + place.header))
            names.append(f"{place.key}.{suffix}")
        os.fsync(file.fileno())
    write_records(shard.dest, shard.split, shard.number, rows, names, [])
    shard.temporary.replace(shard.dest / shard_name(shard.split, shard.number))


def _make_anew(shard: _Shard) -> None:
    """Write the shard from the originals, as `pack` writes it from a tree."""
    assert shard.task is not None
    made = shard.temporary.with_name(f".anew{shard.temporary.name}")

    def contents() -> Iterator[bytes]:
        with shard.temporary.open("rb") as file:
            for place in shard.places:
                file.seek(place.start + place.header)
                yield file.read(place.size)

    restart = shard.task.options.restart is not None
    with ShardWriter(shard.dest, shard.split, shard.number, restart, made) as writer:
        fill_shard(writer, shard.task, open_source(shard.task), contents())
    shard.temporary.unlink()


def pack_parquet(
    root: Path,
    files: dict[str, tuple[Path, ...]],
    dest: Path,
    options: Options,
    part: str | None = None,
    processes: int | None = None,
    quiet: bool = True,
    source_index: Path | None = None,
) -> Index | None:
    """Pack the parquet files of each split into `dest`; as `pack_tree`, whose arguments these are.

    source_index: folder for what is learned of the files; default: below `dest`, until the shards are complete.

    Raises UserError where pyarrow is missing, for files that are damaged or lack images or labels, and as `pack_tree`.
    """
    turn, parts = parse_part(part)
    processes, given, root = processes or available_cores(), root, root.resolve()
    files = {split: tuple(root / path.relative_to(given) for path in paths) for split, paths in files.items()}
    stats = {os.path.relpath(path, root): stat_file(path) for paths in files.values() for path in paths}
    source = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    done = read_marker(dest)
    if done.get(MARK) == source and not options.difference(done.get("options")):
        made = find_complete(dest)
        if made is not None and all((dest / name).is_file() for name in _list_files(made)):
            return made
    refuse_foreign(dest)
    with contextlib.ExitStack() as stack:
        try:
            _lock(stack, dest, part, turn, parts)
        except OSError as error:
            raise explain(error, error.filename or dest) from error
        index = scan_parquet(root, files, source_index or dest / STATE / "source", processes)

        def write(plan: Plan, todo: list[tuple[str, int]]) -> None:
            _write(dest, index, _deal(dest, index, plan, options, todo), processes, quiet)

        return pack_index(root, dest, index, options, part, quiet, {MARK: source}, write, _read_row)


def _list_files(index: Index) -> Iterator[str]:
    return itertools.chain.from_iterable(map(list_shard_files, index.splits.values()))


def _lock(stack: contextlib.ExitStack, dest: Path, part: str | None, turn: int, parts: int) -> None:
    """Keep others from the shards of this run: a whole run is alone, parts of the same number of parts go together.

    Raises UserError where another process writes the same shards, OSError where a lock can't be made.
    """
    state, busy = dest / STATE, f"another process is packing into {dest}; wait for it"
    state.mkdir(parents=True, exist_ok=True)
    if part is None:
        _refuse_parts(dest)  # which names it
        stack.enter_context(locked(state / "lock", busy, wait=False))
        return
    stack.enter_context(locked(state / "lock", busy, wait=False, shared=True))
    of_part = f"another process is packing part {part} into {dest}; wait for it"
    stack.enter_context(locked(state / f"part-{turn}-of-{parts}.lock", of_part, wait=False))
    _refuse_parts(dest, allowed=parts)


def _refuse_parts(dest: Path, allowed: int | None = None) -> None:
    """UserError where a job still writes a part of the shards. allowed: a number of parts whose jobs may go on."""
    for path in sorted((dest / STATE).glob("part-*.lock")):
        turn, _, parts = path.stem.removeprefix("part-").partition("-of-")
        if parts == str(allowed):
            continue
        with path.open("a") as file:
            if not try_lock(file):
                raise UserError(f"another process is packing part {turn}/{parts} into {dest}; wait for it")


def _read_row(index: Index, split: str, sample: int) -> bytes:
    """A sample's bytes, from its row."""
    of_split = index.splits[split]
    path, row = str(of_split.path(sample)), int(of_split.records["offset"][sample])
    file = open_file(path)
    group = group_of(file, row)
    found = next(itertools.islice(read_rows(path, file.image, group), row - file.firsts[group], None))
    if xxhash.xxh3_64_intdigest(found or b"") != int(of_split.records["digest"][sample]):
        raise UserError(f"{path} has changed since it was read; run the same command again")
    return found


def _write(dest: Path, index: Index, todo: list[_Shard], processes: int, quiet: bool) -> None:
    """Write and finish shards."""
    found = map_in_order(_find_written, todo, min(processes, max(1, len(todo))))
    described: dict[str, File] = {}
    groups: dict[tuple[str, int], _Group] = {}
    for shard, there in zip(todo, found, strict=True):
        for place, is_there in zip(shard.places, there, strict=True):
            if not is_there:
                file, row = place.source
                path = f"{index.root}/{file}"
                if path not in described:
                    described[path] = open_file(path)
                at = path, group_of(described[path], row)
                groups.setdefault(at, _Group(*at, dest, {})).rows[row] = shard.split, place
    tasks = [groups[at] for at in sorted(groups)]
    total = sum(len(task.rows) for task in tasks)
    bytes_left = sum(place.size for task in tasks for _, place in task.rows.values())
    anew = sorted(shard.size for shard in todo if shard.task is not None)
    remedy = "free some space or give another folder"
    if anew:
        remedy += ", or pack one part after another (--part): the originals of all shards at work are written first"
    check_space(dest, bytes_left + sum(anew[-processes:]), len(todo), remedy)
    with Progress("Reading rows", total, "images", quiet=quiet or not total) as progress:
        for count in map_in_order(_write_group, tasks, min(processes, max(1, len(tasks)))):
            progress.advance(count)
    total = sum(len(shard.places) for shard in todo)
    with Progress("Packing", total, "images", quiet=quiet or not todo) as progress:
        for count in map_in_order(_finish_shard, todo, min(processes, max(1, len(todo)))):
            progress.advance(count)
