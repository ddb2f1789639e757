"""Hugging Face parquet files straight into tar shards: the bytes that `pack` makes from the same images in folders.

The files are read twice: to decode every image and to learn its size, then to put each where its shard has a place for
it. A kill costs the row groups at work. A shard whose images are made again (smaller, with restart markers, fixed) is
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
from pipeline.dataset.lock import locked, try_lock
from pipeline.dataset.shards.format import (
    Sample,
    ShardWriter,
    image_suffix,
    make_row,
    whole_size,
)
from pipeline.dataset.shards.in_place import write_in_place
from pipeline.dataset.shards.marker import find_complete, read_marker, refuse_foreign
from pipeline.dataset.shards.pack import pack_index, parse_part
from pipeline.dataset.shards.parquet.places import Place, Shard, deal, find_written, members_of
from pipeline.dataset.shards.parquet.scan import File, group_of, open_file, read_rows, scan_parquet, stat_file
from pipeline.dataset.shards.plan import Options, Plan
from pipeline.dataset.shards.records import STATE, shard_name, write_records
from pipeline.dataset.shards.restart import has_shard_files
from pipeline.dataset.shards.write_shard import fill_shard, open_source
from pipeline.dataset.workers import map_in_order
from pipeline.errors import UserError
from pipeline.limits import available_cores
from pipeline.progress import Progress

MARK = "parquet"  #: in the marker of the shards: file, relative to the root -> its bytes and its time


@dataclass(frozen=True)
class _Group:
    """The rows of a row group that are to be written: split, and the place of each, by row."""

    path: str
    row_group: int
    dest: Path
    rows: dict[int, tuple[str, Place]]


def _write_group(group: _Group) -> int:
    """Put rows of a group into their places; returns how many."""
    file = open_file(group.path)
    for row, found in enumerate(read_rows(group.path, file.image, group.row_group), file.firsts[group.row_group]):
        if row in group.rows:
            (split, place), data = group.rows[row], found or b""
            if len(data) != place.size or (data and xxhash.xxh3_64_intdigest(data) != place.digest):
                raise UserError(f"{group.path} has changed since it was read; run the same command again")
            write_in_place(group.dest, split, place.shard, members_of(place, data), place.start)
    return len(group.rows)


def _finish_shard(shard: Shard) -> int:
    """Check a shard from disk and give it its name; returns its samples."""
    if not all(find_written(shard)):
        shard.temporary.unlink(missing_ok=True)
        raise UserError(f"{shard.temporary} does not hold what was written; check the disk, run the same command again")
    try:
        (_keep if shard.task is None else _make_anew)(shard)
    except OSError as error:
        raise explain(error, shard.temporary) from error
    return len(shard.places)


def _keep(shard: Shard) -> None:
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


def _make_anew(shard: Shard) -> None:
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
        if made is not None and has_shard_files(made):
            return made
    refuse_foreign(dest)
    with contextlib.ExitStack() as stack:
        try:
            _lock(stack, dest, part, turn, parts)
        except OSError as error:
            raise explain(error, error.filename or dest) from error
        index = scan_parquet(root, files, source_index or dest / STATE / "source", processes)

        def write(plan: Plan, todo: list[tuple[str, int]]) -> None:
            _write(dest, index, deal(dest, index, plan, options, todo), processes, quiet)

        return pack_index(root, dest, index, options, part, quiet, {MARK: source}, write, _read_row)


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
        with path.open("a", encoding="utf-8") as file:
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


def _write(dest: Path, index: Index, todo: list[Shard], processes: int, quiet: bool) -> None:
    """Write and finish shards."""
    found = map_in_order(find_written, todo, min(processes, max(1, len(todo))))
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
