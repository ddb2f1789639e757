"""The verb `pack`: an indexed tree as tar shards with an index, by all cores or many machines, shard by shard.

Any process can write any shard (see `pack_plan`), the bytes are always the same, and what is whole is never written
twice. The index keeps ImageFolder's order whatever the shards hold.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pipeline.command import run_command
from pipeline.counts import count
from pipeline.dataset import imagenet
from pipeline.dataset.disk import explain, explain_read
from pipeline.dataset.index.index import MAIN_FILE, PACKED, Index, index_folder, open_index, open_sound
from pipeline.dataset.index.left_out import describe, only_images, without_images
from pipeline.dataset.index.notes import UNREADABLE_FILE, read_unreadable
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.layouts.parquet_files import find_parquet
from pipeline.dataset.selected import read_selected
from pipeline.dataset.shards.marker import note_source, prepare
from pipeline.dataset.shards.plan import (
    Options,
    Plan,
    Read,
    make_plan,
    parse_restart,
    read_checked,
    spell_out_restart,
)
from pipeline.dataset.shards.records import exists, is_whole, merge_shards, remove_records, shard_name
from pipeline.dataset.shards.transcode import find_program
from pipeline.dataset.shards.write_shard import Task, write_shard
from pipeline.dataset.workers import map_in_order
from pipeline.errors import UserError, permission_problem
from pipeline.files import appears, atomic_open, atomic_write
from pipeline.limits import available_cores
from pipeline.progress import Progress

#: Lists of the archive that go with the shards, so that `verify` knows what is to be there.
LISTS = (imagenet.SYNSET_MAPPING, imagenet.VAL_SOLUTION, imagenet.TRAIN_LIST)


def parse_part(part: str | None) -> tuple[int, int]:
    """ "3/8" as (3, 8), None as (1, 1). UserError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part is {part}; give I/N with I from 1 to N, like 3/8")
    return int(match[1]), int(match[2])


def _open_source(root: Path, folder: Path, part: str | None, processes: int | None) -> Index:
    if part is None:
        return build_index(root, folder, processes)
    if not appears(folder / MAIN_FILE):  # many parts must not scan the same tree at once
        elsewhere = "" if folder == index_folder(root) else f" --out {folder}"
        raise UserError(f"{folder} holds no index yet; run first: pipeline index {root}{elsewhere}")
    return open_sound(folder)


def _finish(
    root: Path, dest: Path, index: Index, shards: dict[str, int], notes_of_source: dict, options: Options
) -> Index:
    """Merge the shards' records into the index, take the archive's lists along, and mark the folder as complete."""
    for folder in (dest, index_folder(dest)):
        for path in folder.glob(".*.tmp"):  # what killed runs left
            path.unlink()
    saved = options.unreadable == "reencode" and not index.is_packed  # only those listed in the notes
    classes = list(zip(index.synsets, index.words, strict=True))
    made, notes = merge_shards(dest, classes, shards, None if saved else only_images(index.left_out))
    for name in LISTS:
        if (root / name).is_file():
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            _copy_list(root / name, dest / name)
    marker = json.loads((dest / PACKED).read_bytes()) | notes_of_source
    atomic_write(dest / UNREADABLE_FILE, json.dumps(notes, indent=1) + "\n")
    atomic_write(dest / PACKED, json.dumps({**marker, "complete": True}, indent=1) + "\n")
    remove_records(dest)
    return made


def _copy_list(source: Path, target: Path) -> None:
    try:
        file = source.open("rb")
    except OSError as error:
        raise explain_read(error, source) from error
    with file, atomic_open(target) as out:
        shutil.copyfileobj(file, out)


def pack_tree(
    root: Path,
    dest: Path,
    options: Options,
    part: str | None = None,
    processes: int | None = None,
    quiet: bool = True,
    source_index: Path | None = None,
) -> Index | None:
    """Pack `root` into `dest`; the index of the shards, or None where only a part was written.

    Args:
        root: a data root; it is indexed first if need be.
        dest: a new or empty folder, or one that the same command began.
        part: "I/N": write only every N-th shard, and no index.
        processes: default: every core that this process may use.
        source_index: folder of the index of `root`; default `ROOT/index`.

    Raises UserError for unreadable images (if so asked), images changed since indexing, and a folder that won't do.
    """
    parse_part(part)
    folder = source_index or index_folder(root)
    index, selected = _open_source(root, folder, part, processes), read_selected(root)

    def write(plan: Plan, todo: list[tuple[str, int]]) -> None:
        tasks = (make_task(dest, index, plan, options, *shard) for shard in todo)
        total = sum(len(plan.of_shard(*shard)) for shard in todo)
        with Progress("Packing", total, "images", quiet=quiet or not todo) as progress:
            for written in map_in_order(write_shard, tasks, min(processes or available_cores(), max(1, len(todo)))):
                progress.advance(written)

    return pack_index(
        root, dest, index, options, part, quiet, {} if selected is None else {"selected": selected}, write
    )


def make_task(dest: Path, index: Index, plan: Plan, options: Options, split: str, number: int) -> Task:
    """The task that writes one shard."""
    items, extras, twins = plan.of_shard(split, number), tuple(plan.extras[split]), plan.twins[split]
    return Task(index.folder, index.fingerprint, dest, split, number, items, extras, twins, options)


def pack_index(
    root: Path,
    dest: Path,
    index: Index,
    options: Options,
    part: str | None,
    quiet: bool,
    notes_of_source: dict,
    write: Callable[[Plan, list[tuple[str, int]]], None],
    read: Read = read_checked,
) -> Index | None:
    """Plan the shards of what an index names, have those written that are not there, and finish; see `pack_tree`.

    notes_of_source: what the marker is to say of it; write: writes shards; read: as of `make_plan`.
    """
    turn, parts = parse_part(part)
    unreadable = read_unreadable(index.folder)
    bad = [entry["file"] for entries in unreadable.values() for entry in entries]
    if bad and options.unreadable == "refuse":
        raise UserError(
            f"{count(len(bad), 'image')} of {root} can't be read, such as {bad[0]} "
            f"(see {index.folder / UNREADABLE_FILE}); fetch them again, or give --unreadable skip (leave them out) or "
            "reencode (save what can be seen)"
        )
    left_out = describe(without_images(index.left_out))  # `pack` lists what can't be read
    if left_out and not quiet:
        print(f"left out of the shards: {left_out}", file=sys.stderr)
    plan = make_plan(index, options, unreadable, read)
    complete = prepare(dest, index, options, plan)
    mine = [shard for i, shard in enumerate(plan.shards()) if i % parts == turn - 1]
    is_there, restart = exists if complete else is_whole, options.restart is not None
    todo = [shard for shard in mine if not is_there(dest, *shard, restart)]
    if todo and restart:
        find_program()
    if len(todo) < len(mine) and not quiet:
        print(f"{len(mine) - len(todo):,} of {len(mine):,} shards exist already", file=sys.stderr)
    try:
        write(plan, todo)
        if complete:
            note_source(dest, notes_of_source)
            remove_records(dest)
            return open_index(index_folder(dest))
        if part is not None:
            return None
        shards = {split: len(cuts) - 1 for split, cuts in plan.cuts.items()}
        return _finish(root, dest, index, shards, notes_of_source, options)
    except PermissionError as error:
        raise permission_problem(error) from error
    except OSError as error:
        raise explain(error, error.filename or dest) from error


def pack(
    root: str,
    dest: str,
    short_side: int | None = None,
    quality: int = 90,
    shard_mb: int = 256,
    resize_val: bool = False,
    unreadable: Literal["refuse", "skip", "reencode"] = "refuse",
    seed: int = 0,
    part: str | None = None,
    processes: int | None = None,
    restart: Literal["auto"] | int | None = None,
    index: str | None = None,
) -> int:
    """Write a data root as WebDataset tar shards with an index. Run the same command again to resume.

    Args:
        root: a data root, which is indexed first if need be, or a folder with Hugging Face's parquet files.
        dest: folder for the shards: new, empty, or begun by the same command.
        short_side: reduce training images to this shorter side in pixels (smaller ones stay as they are).
        quality: JPEG quality of what is re-encoded.
        shard_mb: megabytes of a shard.
        resize_val: reduce the validation images, too; they stay original otherwise.
        unreadable: what to do with images that do not decode: refuse, skip (leave out), or reencode what can be seen.
        seed: of the shuffle that deals samples out to shards.
        part: I/N writes every N-th shard from the I-th, for N jobs at once; the same command without it finishes.
        processes: number of processes; default: all cores.
        restart: add restart markers to the JPEGs, without loss, so that training reads and decodes only the part of an
            image that it crops. MCUs a restart interval, or auto (8). Requires the program jpegtran.
        index: folder of the index of ROOT, for a root that can't be written; default ROOT/index (of parquet files: a
            folder below DEST, until the shards are complete).
    """
    options = Options(short_side, quality, shard_mb, resize_val, unreadable, seed, parse_restart(restart))
    source_index = Path(index).expanduser() if index else None
    files = find_parquet(Path(root))
    if files:
        from pipeline.dataset.shards.parquet.pack import pack_parquet

        made = pack_parquet(Path(root), files, Path(dest), options, part, processes, False, source_index)
    else:
        made = pack_tree(Path(root), Path(dest), options, part, processes, quiet=False, source_index=source_index)
    if made is None:
        print(f"{dest}: part {part} is written; when all parts are, run the same command without --part")
        return 0
    for split, of_split in made.splits.items():
        last = len(of_split.shards) - 1
        size = sum((made.root / shard).stat().st_size for shard in of_split.shards)
        span = f"{split}-{{000000..{last:06d}}}.tar" if last else shard_name(split, 0)
        print(f"{dest}/{span}: {count(len(of_split), 'image')} in {count(last + 1, 'shard')}, {size / 1e6:,.1f} MB")
    print(f"{made.folder}: fingerprint {made.fingerprint}")
    notes = [note for of_split in read_unreadable(made.root).values() for note in of_split]
    for note in notes[:20]:
        print(f"{note['file']}: {note['done']}{': ' + note['reason'] if 'reason' in note else ''}")
    if len(notes) > 20:
        print(f"... and {len(notes) - 20} more: see {made.root / UNREADABLE_FILE}")
    return 0


def main(argv: list[str]) -> int:
    return run_command(pack, "pack", spell_out_restart(argv))
