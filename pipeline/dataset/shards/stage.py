"""Copy packed shards to a node's own disk, and reuse existing copies. One process per node copies at a time."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from pipeline.command import run_command
from pipeline.dataset.disk import check_space, explain, explain_read
from pipeline.dataset.index.index import (
    MAIN_FILE,
    PACKED,
    Index,
    Split,
    has_index,
    index_folder,
    list_files,
    open_index,
    open_sound,
    safe_join,
)
from pipeline.dataset.lock import locked
from pipeline.dataset.shards.restart import MAGIC, TABLE, is_intact, list_shard_files, table_name
from pipeline.errors import UserError, permission_problem
from pipeline.files import atomic_write
from pipeline.progress import Progress

CHUNK = 1 << 24  # bytes copied at a time
THREADS = 4  # files copied at a time
_SECOND = 10**9  # ns


def locked_folder(folder: Path) -> AbstractContextManager[None]:
    """Hold the folder's lock, so that a second job on the same node waits for the first one's copy."""
    return locked(folder / ".stage.lock", f"{folder}: another process is copying into it; waiting")


def refuse_other_shards(dest: Path, fingerprint: str) -> None:
    """UserError where `dest` is a folder that other shards than those with `fingerprint` were packed into: they may be
    the only ones, and have the same names."""
    if (dest / PACKED).exists() and has_index(index_folder(dest)):
        theirs = open_index(index_folder(dest)).fingerprint
        if theirs != fingerprint:
            raise UserError(
                f"{dest} holds other shards, packed there (fingerprint {theirs}); give another folder, or remove it"
            )


def is_same(there: Path, here: Path) -> bool:
    """Has `here` the size and the modification time of `there`? Some file systems keep whole seconds of it."""
    try:
        wanted, found = there.stat(), here.stat()
    except FileNotFoundError:
        return False
    times = (wanted.st_mtime_ns, wanted.st_mtime_ns // _SECOND * _SECOND)
    return wanted.st_size == found.st_size and found.st_mtime_ns in times


def find_parts(split: Split) -> dict[str, np.ndarray]:
    """Shard or restart table -> [n, 3] uint64, in the order of the bytes: offset, bytes, xxh3_64 of each sample; of the
    entries in a table: offset, bytes, xxh3_64 of their samples."""
    records = np.asarray(split.records)
    columns = [records["offset"], records["size"], records["digest"]]
    found = dict(zip(split.shards, _by_shard(split, columns), strict=True))
    if split.restart is not None:
        restart = np.asarray(split.restart)
        columns = [restart["table_offset"], restart["table_size"], records["digest"]]
        found |= zip(map(table_name, split.shards), _by_shard(split, columns), strict=True)
    return found


def _by_shard(split: Split, columns: list[np.ndarray]) -> list[np.ndarray]:
    """The columns as uint64 [n, 3] of each shard, sorted by the first."""
    shard = np.asarray(split.records["shard"])
    rows = np.stack([column.astype(np.uint64) for column in columns], axis=1)
    order = np.lexsort((rows[:, 0], shard))
    cuts = np.searchsorted(shard[order], np.arange(len(split.shards) + 1))
    return [rows[order[cuts[i] : cuts[i + 1]]] for i in range(len(split.shards))]


def is_sound(path: Path, parts: np.ndarray, is_table: bool) -> bool:
    """Has every sample in a shard, or entry in a restart table, its digest? parts: as of `find_parts`."""
    with path.open("rb") as opened:
        if is_table and opened.read(len(MAGIC)) != MAGIC:
            return False
        for offset, size, digest in parts.tolist():
            opened.seek(offset)
            data = opened.read(size)
            if is_table:
                if size and not is_intact(data, digest):
                    return False
            elif xxhash.xxh3_64_intdigest(data) != digest:
                return False
    return True


def copy_file(
    there: Path, here: Path, advance: Callable[[int], None], is_whole: Callable[[Path], bool] = lambda _: True
) -> None:
    """Copy under a temporary name and rename, with times; `advance` gets the bytes of each piece.

    is_whole: judges the copy; one that is not is made once more, and a line says so where that does not help.
    The temporary name is fixed: a later copy overwrites what a killed one left.
    """
    here.parent.mkdir(parents=True, exist_ok=True)
    temporary = here.with_name(f".{here.name}.stage.tmp")
    with there.open("rb") as source, temporary.open("wb") as target:
        for piece in _read(source, there):
            target.write(piece)
            advance(len(piece))
    if not is_whole(temporary):
        with there.open("rb") as source, temporary.open("wb") as target:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk or its server anew
            shutil.copyfileobj(source, target, CHUNK)
        what = "was damaged on its way, and is copied again"
        if not is_whole(temporary):
            what = "does not hold what its index names, and neither does the copy; see: pipeline verify ROOT"
        print(f"{there}: {what}", file=sys.stderr, flush=True)
    shutil.copymode(there, temporary)
    times = there.stat()
    os.utime(temporary, ns=(times.st_atime_ns, times.st_mtime_ns))
    temporary.replace(here)


def _read(source: BinaryIO, there: Path) -> Iterator[bytes]:
    """The bytes of a file, in pieces; its disk is not taken for the copy's."""
    try:
        while piece := source.read(CHUNK):
            yield piece
    except OSError as error:
        raise explain_read(error, there) from error


def stage_shards(source: Path, dest: Path, index: Path | None = None, quiet: bool = False) -> tuple[Index, int]:
    """Copy a packed data set to `dest`. Returns the index of the copy and the number of shards copied.

    Args:
        source: data root with packed shards.
        dest: folder on this node's own disk, made if missing; becomes a data root.
        index: folder of the source's index; default SOURCE/index.

    Raises UserError for a tree of images, a missing shard, or a disk that is too small.
    """
    index = index or index_folder(source)
    opened = open_sound(index)
    for name, split in opened.splits.items():
        if not split.shards:
            raise UserError(f"{source}: {name} is a tree of single files; pack it into shards first (pipeline pack)")
    wanted = {
        safe_join(opened.root, name): name for split in opened.splits.values() for name in list_shard_files(split)
    }
    refuse_other_shards(dest, opened.fingerprint)
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with locked_folder(dest):
            missing = [(there, dest / name) for there, name in wanted.items() if not is_same(there, dest / name)]
            size = sum(there.stat().st_size for there, _ in missing)
            check_space(dest, size, len(missing), "free some space, give another folder, or train from the source")
            with Progress(f"Copying to {dest}", size, "bytes", quiet) as progress, ThreadPoolExecutor(THREADS) as pool:
                lock = threading.Lock()

                def advance(count: int) -> None:
                    with lock:
                        progress.advance(count)

                parts = {k: v for split in opened.splits.values() for k, v in find_parts(split).items() if missing}

                def copy(there: Path, here: Path) -> None:
                    table = there.name.endswith(TABLE)
                    copy_file(there, here, advance, lambda copy: is_sound(copy, parts[wanted[there]], table))

                tasks = [pool.submit(copy, there, here) for there, here in missing]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:  # Ctrl-C, too: the rest may be a hundred gigabytes
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            copy_index(index, index_folder(dest))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file; pack or fetch it again") from error
    except PermissionError as error:
        raise permission_problem(error) from error
    except OSError as error:
        raise explain(error, error.filename or dest) from error
    return open_index(index_folder(dest)), sum(there.suffix != TABLE for there, _ in missing)


def copy_index(there: Path, here: Path) -> None:
    """Copy an index's files, `index.json` last; the folder above is its root."""
    here.mkdir(exist_ok=True)
    meta = json.loads((there / MAIN_FILE).read_bytes()) | {"root": ".."}
    for entry in meta["splits"].values():
        for name in list_files(entry):
            copy_file(safe_join(there, name), here / name, lambda _: None)
    atomic_write(here / MAIN_FILE, json.dumps(meta, indent=1))


def stage(source: str, dest: str, index: str | None = None) -> int:
    """Copy packed shards to a node's own disk, reusing existing copies; then train with --data.root DEST.

    Args:
        source: data root with packed shards, seen by every node; or s3://BUCKET/FOLDER that one was uploaded to.
        dest: folder on the node's own disk.
        index: folder of the source's index; default SOURCE/index.
    """
    from pipeline.dataset.shards.stage_remote import stage_url
    from pipeline.dataset.shards.store import is_url

    if is_url(source):
        if index is not None:
            raise UserError(f"--index {index}: shards of {source} are staged with the index beside them; leave it out")
        opened, copied = stage_url(source, Path(dest))
    else:
        opened, copied = stage_shards(Path(source), Path(dest), Path(index) if index else None)
    total = sum(len(split.shards) for split in opened.splits.values())
    print(
        f"{dest}: {copied} of {total} shards copied, {total - copied} existed already; fingerprint {opened.fingerprint}"
    )
    return 0


def main(argv: list[str]) -> int:
    return run_command(stage, "stage", argv)
