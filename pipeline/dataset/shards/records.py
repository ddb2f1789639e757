"""What is known of the samples of each shard, in `.packing/` until `merge_shards` makes the index of all shards."""

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.dataset.index.index import RECORD, Index, index_folder
from pipeline.dataset.index.left_out import UNREADABLE, LeftOut, Tally
from pipeline.dataset.index.write import pack_names, write_index
from pipeline.dataset.shards.restart import table_name
from pipeline.errors import UserError
from pipeline.files import atomic_open

STATE = ".packing"  #: folder below the destination: records of the complete shards, until they are merged


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def _records_path(dest: Path, split: str, number: int) -> Path:
    return dest / STATE / f"{split}-{number:06d}.npz"


def exists(dest: Path, split: str, number: int, restart: bool = False) -> bool:
    """Is this shard written, with its restart table if it is to have one?"""
    name = shard_name(split, number)
    return (dest / name).is_file() and (not restart or (dest / table_name(name)).is_file())


def is_whole(dest: Path, split: str, number: int, restart: bool = False) -> bool:
    """Is this shard written, with its records?"""
    return exists(dest, split, number, restart) and _records_path(dest, split, number).is_file()


def write_records(
    dest: Path,
    split: str,
    number: int,
    rows: list[tuple],
    names: list[str],
    notes: list[dict],
    restart: np.ndarray | None = None,
) -> None:
    """Write the records of a shard (`make_row` and member name of each sample, in the shard's order; RESTART)."""
    records, order = np.zeros(len(rows), RECORD), np.zeros(len(rows), np.int64)
    for i, row in enumerate(rows):
        record = records[i]
        for field, value in zip(("digest", "offset", "size", "width", "height", "label"), row, strict=False):
            record[field] = value
        order[i] = row[-1]
    records["shard"] = number
    parts = {"records": records, "order": order, "names": pack_names(names, records)}
    parts["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    if restart is not None:
        parts["restart"] = restart
    with atomic_open(_records_path(dest, split, number)) as file:
        np.savez(file, **parts)  # type: ignore[arg-type]  # its stub takes the first array for allow_pickle


@dataclass(frozen=True)
class _Part:
    """The records of one shard: [n] of RECORD, names, places in the index's order, notes, [n] of RESTART or None."""

    records: np.ndarray
    names: list[str]
    order: np.ndarray
    notes: list[dict]
    restart: np.ndarray | None


def _read_records(dest: Path, split: str, number: int) -> _Part:
    path = _records_path(dest, split, number)
    try:
        with np.load(path, allow_pickle=False) as parts:
            records, order = parts["records"], parts["order"]
            blob, notes = parts["names"].tobytes(), json.loads(parts["notes"].tobytes())
            restart = parts.get("restart")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} can't be read ({error}); remove it and run the same command again") from error
    names = []
    for start, length in zip(records["name_offset"].tolist(), records["name_length"].tolist(), strict=True):
        names.append(blob[start : start + length].decode())
    return _Part(records, names, order, notes, restart)


def merge_shards(
    dest: Path, classes: Sequence[tuple[str, str]], shards: dict[str, int], left_out: LeftOut | None = None
) -> tuple[Index, dict[str, list[dict]]]:
    """Make the index of all shards (split -> how many); every one must be complete. Returns its notes by split, too.

    left_out: images that the source's index left out and the shards do not hold; those of the notes are added.
    """
    splits: dict[str, tuple[np.ndarray, Sequence[str]]] = {}
    notes, restart = {}, {}
    for split, number in shards.items():
        parts = [_read_records(dest, split, i) for i in range(number)]
        records = np.concatenate([part.records for part in parts])
        order = np.concatenate([part.order for part in parts]).argsort(kind="stable")
        names = [name for part in parts for name in part.names]
        notes[split] = [note for part in parts for note in part.notes]
        splits[split] = records[order], [names[i] for i in order]
        tables = [part.restart for part in parts if part.restart is not None]
        if len(tables) == len(parts):
            restart[split] = np.concatenate(tables)[order]
    files: dict[str, Sequence[str]] = {
        split: [shard_name(split, i) for i in range(number)] for split, number in shards.items()
    }
    lost = {split: dict(left_out[split]) if left_out and split in left_out else {} for split in shards}
    for split, of_split in notes.items():
        tally = Tally()
        for note in of_split:
            if note.get("done") == "left out":
                tally.add(UNREADABLE, note["file"])
        lost[split] = (Tally(lost[split]) + tally).reasons
    made = write_index(index_folder(dest), dest, classes, splits, shards=files, left_out=lost, restart=restart)
    return made, notes


def remove_records(dest: Path) -> None:
    """Remove the records of the single shards, once the index of them all is there."""
    shutil.rmtree(dest / STATE, ignore_errors=True)
