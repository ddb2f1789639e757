"""Writing an index: new files first, then the main file, by which it counts."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.dataset.index.index import FORMAT, MAIN_FILE, Index, compute_fingerprint, list_files, open_index
from pipeline.dataset.index.left_out import LeftOut
from pipeline.errors import UserError
from pipeline.files import atomic_open, atomic_write, reason_of


def pack_names(names: Sequence[str], records: np.ndarray) -> np.ndarray:
    """Write `name_offset` and `name_length` into `records` [n]; returns the names end to end as uint8."""
    encoded = [name.encode() for name in names]
    lengths = np.fromiter(map(len, encoded), np.uint64, len(encoded))
    records["name_length"] = lengths
    records["name_offset"] = np.cumsum(lengths) - lengths
    return np.frombuffer(b"".join(encoded), np.uint8)


def write_index(
    folder: Path,
    root: Path,
    classes: Sequence[tuple[str, str]],
    splits: dict[str, tuple[np.ndarray, Sequence[str]]],
    shards: dict[str, Sequence[str]] | None = None,
    folders: dict[str, int] | None = None,
    left_out: LeftOut | None = None,
    restart: dict[str, np.ndarray] | None = None,
) -> Index:
    """Write an index atomically and open it.

    Args:
        folder: the index's own folder, made if missing.
        root: the folder that names and shards are relative to.
        classes: (synset, words) in label order.
        splits: name -> (records [n] of RECORD, n names); the name fields of the records are filled in here.
        shards: split -> shard file names, for packed data.
        folders: scanned folder -> mtime_ns, by which `is_current` sees changes.
        left_out: what lies in the root and is not in the index.
        restart: split -> [n] of RESTART, for shards with restart markers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = compute_fingerprint([s for s, _ in classes], {k: r for k, (r, _) in splits.items()}, restart)
    meta: dict[str, Any] = {"format": FORMAT, "fingerprint": fingerprint, "classes": [list(c) for c in classes]}
    try:
        home, place = root.resolve(), folder.resolve()
        meta["root"] = os.path.relpath(home, place) if place.is_relative_to(home) else str(home)
        meta["splits"] = {}
        for name, (records, names) in splits.items():
            blob = pack_names(names, records)
            tag = xxhash.xxh3_64_hexdigest(records.tobytes())  # of places too: a new file for every new content
            names_file = f"{name}-names-{xxhash.xxh3_64_hexdigest(blob.data)}.names"
            files = {"records": f"{name}-{tag}.npy", "names": names_file}
            with atomic_open(folder / files["records"]) as file:
                np.save(file, records)
            with atomic_open(folder / files["names"]) as file:
                file.write(blob.data)
            if restart and name in restart:
                files["restart"] = f"{name}-restart-{xxhash.xxh3_64_hexdigest(restart[name].tobytes())}.npy"
                with atomic_open(folder / files["restart"]) as file:
                    np.save(file, restart[name])
            meta["splits"][name] = {
                **files,
                "count": len(records),
                "shards": list((shards or {}).get(name, ())),
            }
        meta["folders"] = folders or {}
        meta["left_out"] = left_out or {}
        atomic_write(folder / MAIN_FILE, json.dumps(meta, indent=1))
    except OSError as error:
        reason = reason_of(error, folder)
        raise UserError(f"can't write the index into {folder} ({reason}); choose another folder for it") from error
    _remove_stale(folder, meta)
    return open_index(folder)


def _remove_stale(folder: Path, meta: dict) -> None:
    """Remove files of earlier indexes, and temporary files of killed writers that are older than an hour."""
    wanted = {name for split in meta["splits"].values() for name in list_files(split)}
    for path in folder.iterdir():
        stale = path.suffix in (".npy", ".names") and path.name not in wanted
        if stale or (path.suffix == ".tmp" and time.time() - path.stat().st_mtime > 3600):
            path.unlink(missing_ok=True)
