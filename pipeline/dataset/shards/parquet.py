"""Hugging Face parquet files straight into tar shards: the bytes that `pack` makes from the same images in folders.

The files are read twice: to decode every image and to learn its size, then to put each where its shard has a place for
it. A kill costs the row groups at work.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.dataset.disk import explain
from pipeline.dataset.index.index import PACKED, Index, index_folder, open_index
from pipeline.dataset.index.scan import read_unreadable
from pipeline.dataset.lock import locked
from pipeline.dataset.shards.format import (
    BLOCK,
    STATE,
    Sample,
    image_suffix,
    is_whole,
    make_row,
    shard_name,
    tar_header,
    temporary_path,
    whole_size,
    write_records,
)
from pipeline.dataset.shards.in_place import sample_members, write_in_place
from pipeline.dataset.shards.pack import finish, prepare
from pipeline.dataset.shards.parquet_scan import Group, read_column, scan_parquet
from pipeline.dataset.shards.plan import Options, Plan, make_key, make_plan
from pipeline.dataset.workers import map_in_order
from pipeline.errors import UserError, permission_problem
from pipeline.files import atomic_write
from pipeline.limits import available_cores
from pipeline.progress import Progress


@dataclass(frozen=True)
class _Place:
    """Where a row's sample goes, and what it is. header: bytes of the image's tar header; order: as of `Sample`."""

    number: int
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
    """A shard to be made. size: bytes of its members."""

    dest: Path
    split: str
    number: int
    places: tuple[_Place, ...]
    size: int

    @property
    def temporary(self) -> Path:
        return temporary_path(self.dest, self.split, self.number)


def _deal(dest: Path, index: Index, plan: Plan) -> tuple[list[_Shard], dict[tuple[str, str, int], _Place]]:
    """The shards, and the place of each (split, file, row)."""
    shards, place_of = [], {}
    for split, number in plan.shards():
        of_split, end, places = index.splits[split], 0, []
        for item in plan.of_shard(split, number).tolist():
            record, name = of_split.records[item], of_split.name(item)
            label, size = int(record["label"]), int(record["size"])
            key = make_key(index.synsets[label], name, item in plan.twins[split])
            header, shape = len(tar_header(f"{key}.jpg", size)), (int(record["width"]), int(record["height"]))
            place = _Place(number, end, header, key, name, label, int(record["digest"]), size, shape, 2 * item + 1)
            places.append(place)
            place_of[split, of_split.shards[record["shard"]], int(record["offset"])] = place
            text = len(tar_header(f"{key}.cls", len(str(label)))) + BLOCK
            end += header + size + -size % BLOCK + text
        shards.append(_Shard(dest, split, number, tuple(places), end))
    return shards, place_of


def _members(place: _Place, data: bytes) -> bytes:
    """A sample as it stands in its shard."""
    suffix = image_suffix(data, place.name)
    if len(tar_header(f"{place.key}.{suffix}", len(data))) != place.header:
        raise UserError(f"image {place.name} has too long a name for a tar header; rename it")
    return sample_members(place.key, suffix, data, place.label)


def _write_group(task: tuple[Group, Path, str, list[tuple[int, _Place]]]) -> int:
    """Put rows of a group into their places; returns how many."""
    group, dest, split, rows = task
    column = read_column(group, group.image)
    for row, place in rows:
        data = column[row - group.first] or b""
        if xxhash.xxh3_64_intdigest(data) != place.digest:
            raise UserError(f"{group.path} has changed since it was read; run the same command again")
        write_in_place(dest, split, place.number, _members(place, data), place.start)
    return len(rows)


def _find_written(shard: _Shard) -> list[bool]:
    """Which samples of an unfinished shard are in their places, as a killed run left it."""
    if not shard.temporary.exists():
        return [False] * len(shard.places)
    found = []
    with shard.temporary.open("rb") as file:
        for place in shard.places:
            file.seek(place.start + place.header)
            data = file.read(place.size)
            same = xxhash.xxh3_64_intdigest(data) == place.digest
            whole = _members(place, data) if same else b""
            file.seek(place.start)
            found.append(same and file.read(len(whole)) == whole)
    return found


def _finish_shard(shard: _Shard) -> int:
    """Check a shard from disk and give it its name; returns its samples."""
    rows, names = [], []
    if not all(_find_written(shard)):
        shard.temporary.unlink(missing_ok=True)
        raise UserError(f"{shard.temporary} does not hold what was written; check the disk, run the same command again")
    try:
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
    except OSError as error:
        raise explain(error, shard.temporary) from error
    return len(shard.places)


def pack_parquet(
    root: Path,
    files: dict[str, tuple[Path, ...]],
    dest: Path,
    options: Options,
    processes: int | None = None,
    quiet: bool = True,
) -> Index:
    """Pack the parquet files of each split into `dest`; the index of the shards.

    Raises UserError where pyarrow is missing, for options that re-encode, for files without images and labels, and (if
    so told) for images that do not decode.
    """
    if options.short_side is not None or options.restart is not None or options.unreadable == "reencode":
        raise UserError(
            "--short-side, --restart and --unreadable reencode do not go with parquet files: pack without them, then "
            f"pack the shards: pipeline pack {dest} DEST ..."
        )
    processes = processes or available_cores()
    root, source = root.resolve(), {str(path.name): path.stat().st_size for paths in files.values() for path in paths}
    done = _read_marker(dest)
    if done.get("complete") and done.get("parquet") == source and done.get("options") == options.marker():
        return open_index(index_folder(dest))
    try:
        (dest / STATE).mkdir(parents=True, exist_ok=True)
        with locked(dest / STATE / "lock", f"another process is packing into {dest}; wait for it", wait=False):
            index, groups = scan_parquet(root, files, dest / STATE / "source", processes)
            _refuse_unreadable(index, options)
            plan = make_plan(index, options, {})
            prepare(dest, index, options, plan)
            _write(dest, index, groups, plan, processes, quiet)
            shards = {split: len(cuts) - 1 for split, cuts in plan.cuts.items()}
            made = finish(root, dest, index, shards, None, options)
    except PermissionError as error:
        raise permission_problem(error) from error
    except OSError as error:
        raise explain(error, error.filename or dest) from error
    atomic_write(dest / PACKED, json.dumps(_read_marker(dest) | {"parquet": source}, indent=1) + "\n")
    return made


def _read_marker(dest: Path) -> dict:
    try:
        return dict(json.loads((dest / PACKED).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _refuse_unreadable(index: Index, options: Options) -> None:
    bad = [entry["file"] for entries in read_unreadable(index.folder).values() for entry in entries]
    if bad and options.unreadable == "refuse":
        raise UserError(
            f"{len(bad)} images of {index.root} can't be read, such as {bad[0]} (see {index.folder}); give "
            "--unreadable skip to leave them out"
        )


def _write(dest: Path, index: Index, groups: list[Group], plan: Plan, processes: int, quiet: bool) -> None:
    """Write and finish every shard that is not whole."""
    shards, place_of = _deal(dest, index, plan)
    todo = [shard for shard in shards if not is_whole(dest, shard.split, shard.number)]
    found = map_in_order(_find_written, todo, min(processes, max(1, len(todo))))
    wanted = {
        (shard.split, place.number, place.start)
        for shard, there in zip(todo, found, strict=True)
        for place, is_there in zip(shard.places, there, strict=True)
        if not is_there
    }
    tasks = []
    for group in groups:
        file = os.path.relpath(group.path, index.root)
        for split in index.splits:
            of_group = ((row, place_of.get((split, file, row))) for row in range(group.first, group.first + group.rows))
            rows = [(row, at) for row, at in of_group if at is not None and (split, at.number, at.start) in wanted]
            if rows:
                tasks.append((group, dest, split, rows))
    with Progress("Packing", len(wanted), "images", quiet=quiet or not wanted) as progress:
        for count in map_in_order(_write_group, tasks, min(processes, max(1, len(tasks)))):
            progress.advance(count)
    for _ in map_in_order(_finish_shard, todo, min(processes, max(1, len(todo)))):
        pass
