"""Copy packed shards to a node's own disk, and reuse existing copies. One process per node copies at a time."""

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.command import run_command
from pipeline.dataset.disk import check_space, explain
from pipeline.dataset.index.index import (
    MAIN_FILE,
    PACKED,
    Index,
    has_index,
    index_folder,
    list_files,
    open_index,
    open_sound,
    safe_join,
)
from pipeline.dataset.lock import locked
from pipeline.dataset.shards.restart import TABLE, list_shard_files
from pipeline.errors import UserError, permission_problem
from pipeline.files import atomic_write
from pipeline.progress import Progress

CHUNK = 1 << 24  # bytes copied at a time
THREADS = 4  # files copied at a time


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
    """Has `here` the size and the modification time of `there`?"""
    try:
        wanted, found = there.stat(), here.stat()
    except FileNotFoundError:
        return False
    return (wanted.st_size, wanted.st_mtime_ns) == (found.st_size, found.st_mtime_ns)


def copy_file(there: Path, here: Path, advance: Callable[[int], None]) -> None:
    """Copy under a temporary name and rename, with times; `advance` gets the bytes of each piece.

    The temporary name is fixed: a later copy overwrites what a killed one left.
    """
    here.parent.mkdir(parents=True, exist_ok=True)
    temporary = here.with_name(f".{here.name}.stage.tmp")
    with there.open("rb") as source, temporary.open("wb") as target:
        while piece := source.read(CHUNK):
            target.write(piece)
            advance(len(piece))
    shutil.copystat(there, temporary)
    temporary.replace(here)


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

                for done in [pool.submit(copy_file, there, here, advance) for there, here in missing]:
                    done.result()
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
