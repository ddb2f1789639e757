"""Packed shards from an object store (`s3://BUCKET/SHARDS`) to a node's own disk, by fsspec.

A download that was cut goes on where it stopped. Every sample's digest, and every entry of a restart table, is compared
with the index before a file gets its name, so that a file that is there is whole; its size and time tell later runs so.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.disk import check_space, explain
from pipeline.dataset.index.index import (
    FOLDER,
    MAIN_FILE,
    Index,
    index_folder,
    list_files,
    open_index,
    open_sound,
    safe_join,
)
from pipeline.dataset.shards.restart import TABLE, list_shard_files
from pipeline.dataset.shards.stage import (
    CHUNK,
    THREADS,
    copy_index,
    find_parts,
    is_sound,
    locked_folder,
    refuse_other_shards,
)
from pipeline.dataset.shards.store import Store
from pipeline.errors import TransientError, UserError
from pipeline.files import atomic_write
from pipeline.progress import Progress

_PARTIAL = ".index.stage"  # folder below the destination: the source's index, until the shards are there


@dataclass(frozen=True)
class _File:
    """A shard or a restart table that is to be copied. mtime_ns: that its copy gets; None where the store tells none.
    parts: as of `stage.find_parts`."""

    name: str
    size: int
    mtime_ns: int | None
    parts: np.ndarray

    @property
    def is_table(self) -> bool:
        return self.name.endswith(TABLE)

    def is_sound(self, path: Path) -> bool:
        """Has the file at `path` its size, and every sample or entry in it its digest?"""
        return path.stat().st_size == self.size and is_sound(path, self.parts, self.is_table)


def stage_url(url: str, dest: Path, quiet: bool = False) -> tuple[Index, int]:
    """Copy a packed data set from an object store to `dest`. Returns the index of the copy and the number of shards
    copied.

    Raises UserError for a store that can't be used, a folder without shards and a disk that is too small,
    TransientError for a store that does not answer and for bytes that arrive damaged twice.
    """
    store = Store(url)
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with locked_folder(dest):
            index = _fetch_index(store, dest)
            wanted = list(_list_wanted(store, index))
            missing = [file for file in wanted if not _is_there(file, dest)]
            have = sum(min(file.size, _size(_temporary(file, dest))) for file in missing)
            total = sum(file.size for file in missing)
            check_space(dest, max(0, total - have), len(missing))
            with Progress(f"Copying to {dest}", total, "bytes", quiet) as progress, ThreadPoolExecutor(THREADS) as pool:
                lock = threading.Lock()

                def advance(count: int) -> None:
                    with lock:
                        progress.advance(count)

                tasks = [pool.submit(_copy, store, file, dest, advance) for file in missing]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
            copy_index(dest / _PARTIAL, index_folder(dest))
            shutil.rmtree(dest / _PARTIAL)
    except OSError as error:
        raise explain(error, error.filename or dest) from error
    return open_index(index_folder(dest)), sum(not file.is_table for file in missing)


def _fetch_index(store: Store, dest: Path) -> Index:
    """The source's index, in a folder below `dest` that no verb looks at."""
    folder = dest / _PARTIAL
    raw = store.read(f"{FOLDER}/{MAIN_FILE}")
    try:
        meta = json.loads(raw) | {"root": ".."}
        names = [name for entry in meta["splits"].values() for name in list_files(entry)]
        bare = all(entry["shards"] for entry in meta["splits"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"index {store.url}/{FOLDER}/{MAIN_FILE} is damaged ({error}); upload it again") from error
    if not bare:
        raise UserError(f"{store.url} is a tree of single files; pack it into shards first (pipeline pack)")
    refuse_other_shards(dest, str(meta.get("fingerprint")))
    folder.mkdir(exist_ok=True)
    for name in names:
        if "/" in name or name.startswith("."):
            raise UserError(f"index {store.url}/{FOLDER}/{MAIN_FILE} names the file {name!r}: refused")
        atomic_write(folder / name, store.read(f"{FOLDER}/{name}"), durable=False)
    atomic_write(folder / MAIN_FILE, json.dumps(meta, indent=1), durable=False)
    return open_sound(folder)


def _list_wanted(store: Store, index: Index) -> Iterator[_File]:
    listed = store.list()
    for split in index.splits.values():
        parts = find_parts(split)
        for name in list_shard_files(split):
            try:
                safe_join(index.root, name)
            except ValueError as error:
                raise UserError(f"index of {store.url}: {error}: refused") from error
            info = listed.get(name)
            if info is None or info.get("size") is None:  # an HTTP server's listing tells no sizes
                info = store.info(name)
            if info.get("size") is None:
                raise UserError(f"{store.url}/{name}: the store does not tell its size; copy the folder by other means")
            yield _File(name, int(info["size"]), index.folders.get(name) or _mtime_ns(info), parts[name])


def _mtime_ns(info: dict[str, Any]) -> int | None:
    """When a file was changed, to the second, by any of the names and forms that stores have for it."""
    for key in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = info.get(key)
        with contextlib.suppress(ValueError):
            if isinstance(value, str):
                value = datetime.fromisoformat(value)
            if isinstance(value, datetime):
                value = value.timestamp()
            if isinstance(value, int | float) and value > 0:
                return int(value) * 10**9
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _temporary(file: _File, dest: Path) -> Path:
    here = dest / file.name
    return here.with_name(f".{here.name}.stage.tmp")


def _is_there(file: _File, dest: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        found = (dest / file.name).stat()
        if file.mtime_ns is None:
            return file.is_sound(dest / file.name)
        return (found.st_size, found.st_mtime_ns) == (file.size, file.mtime_ns)
    return False


def _copy(store: Store, file: _File, dest: Path, advance: Callable[[int], None]) -> None:
    here, temporary = dest / file.name, _temporary(file, dest)
    here.parent.mkdir(parents=True, exist_ok=True)
    if _size(temporary) > file.size:
        temporary.unlink()
    for begun in (_size(temporary), 0):  # what a killed copy left may be of another upload: then once more, from 0
        with temporary.open("ab") as target:
            target.truncate(begun)
            advance(begun)
            for start in range(begun, file.size, CHUNK):
                data = store.read(file.name, start, min(start + CHUNK, file.size))
                if len(data) == file.size:  # also from an HTTP server that knows no byte ranges
                    target.truncate(0)
                    target.write(data)
                    advance(file.size - start)
                    break
                target.write(data)
                advance(min(start + CHUNK, file.size) - start)
        if file.is_sound(temporary):
            if file.mtime_ns is not None:
                os.utime(temporary, ns=(file.mtime_ns, file.mtime_ns))
            temporary.replace(here)
            return
        advance(-file.size)
        if not begun:
            break
    temporary.unlink()
    what = "what" if file.is_table else "the samples that"
    raise TransientError(
        f"{store.url}/{file.name} does not hold {what} its index names; upload the shards and their index "
        "again, or run the same command again"
    )
