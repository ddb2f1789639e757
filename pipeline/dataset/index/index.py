"""The index: one memory-mapped record per sample, so that training never walks a directory.

A folder of an index holds `index.json` (classes, counts, fingerprint; the commit point, written last) and for each
split `SPLIT-<digest>.npy` (records, dtype `RECORD`) and `SPLIT-names-<digest>.names` (UTF-8 names, end to end); for
shards with restart markers also `SPLIT-restart-<digest>.npy` (dtype `RESTART`). A digest is the xxh3_64 of the content.
Samples are ordered by class (sorted synsets), then by name, as torchvision's ImageFolder orders them.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import Any

import numpy as np
import xxhash

from pipeline.config import DataConfig
from pipeline.dataset.disk import explain_read
from pipeline.dataset.index.left_out import LeftOut
from pipeline.dataset.selected import PACKED as PACKED
from pipeline.errors import UserError
from pipeline.files import PASSING

RECORD = np.dtype(
    [
        ("digest", "<u8"),  # xxh3_64 of the sample's bytes
        ("offset", "<u8"),  # of the bytes in the shard; 0 in a tree
        ("name_offset", "<u8"),  # into the .names file
        ("mtime_ns", "<i8"),  # of the file in a tree; 0 in a shard
        ("size", "<u4"),  # bytes
        ("width", "<u4"),  # pixels, as stored (EXIF orientation is ignored, as ImageFolder does)
        ("height", "<u4"),
        ("shard", "<i4"),  # number in `Split.shards`; -1: a file of its own, its path is the name
        ("label", "<i4"),
        ("name_length", "<u4"),
    ]
)
#: Of a sample in shards with restart markers. A picture's identity is that of its original: where its bytes lie, and
#: whether they were transcoded without loss, is no part of a run.
RESTART = np.dtype(
    [
        ("digest", "<u8"),  # xxh3_64 of the original's bytes
        ("size", "<u4"),  # bytes of the original
        ("table_offset", "<u4"),  # of its entry in the shard's restart table
        ("table_size", "<u4"),  # bytes of the entry; 0: none, the sample is read as a whole
    ]
)
FORMAT = 1
FOLDER = "index"  #: name of the index folder inside a data root
MAIN_FILE = "index.json"  #: the file of an index folder that is written last


@dataclass(frozen=True)
class Split:
    """The samples of one split. `records`: [n] of RECORD; `shards`: file names relative to `root`; `restart`: [n] of
    RESTART where the shards have restart markers."""

    root: Path
    records: np.ndarray
    names: np.ndarray
    shards: tuple[str, ...] = ()
    restart: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.records)

    def name(self, sample_id: int) -> str:
        """Path relative to `root` (tree) or member name (shard), with '/' between parts."""
        start = int(self.records["name_offset"][sample_id])
        return bytes(self.names[start : start + int(self.records["name_length"][sample_id])]).decode()

    def iter_names(self) -> Iterator[str]:
        """All names in order, without holding them all."""
        for first in range(0, len(self), 1 << 14):
            part = self.records[first : first + (1 << 14)]
            ends = (part["name_offset"] + part["name_length"]).tolist()
            start = int(part["name_offset"][0])
            blob = self.names[start : ends[-1]].tobytes()
            for end, length in zip(ends, part["name_length"].tolist(), strict=True):
                yield blob[end - start - length : end - start].decode()

    def read(self, sample_id: int) -> bytes:
        """The sample's bytes, unchecked. OSError where they can't be read."""
        record = self.records[sample_id]
        with self.path(sample_id).open("rb") as file:
            file.seek(int(record["offset"]))
            return file.read(int(record["size"]) if record["shard"] >= 0 else -1)

    def identity(self, sample_id: int) -> tuple[int, int]:
        """(xxh3_64, bytes) of the sample's original."""
        of = self.records if self.restart is None else self.restart
        return int(of["digest"][sample_id]), int(of["size"][sample_id])

    def path(self, sample_id: int) -> Path:
        """The file that holds the sample's bytes: its own, or its shard. ValueError if it would leave `root`."""
        shard = int(self.records["shard"][sample_id])
        return safe_join(self.root, self.name(sample_id) if shard < 0 else self.shards[shard])


class Splits(dict[str, Split]):
    """The splits of an index. Raises UserError for one that the data set does not have."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, name: str) -> Split:
        kind = {"train": "training", "val": "validation"}.get(name, name)
        raise UserError(f"{self.root} has no {kind} images; give a data root with {name}/, or put them there")


@dataclass(frozen=True)
class Index:
    """An opened index. `synsets` and `words` are in label order; `fingerprint` covers content and order, not places."""

    folder: Path
    root: Path
    synsets: tuple[str, ...]
    words: tuple[str, ...]
    splits: dict[str, Split]
    fingerprint: str
    folders: dict[str, int]  # scanned folder or tar file, relative to root -> mtime_ns; empty for packed shards
    left_out: LeftOut = field(default_factory=dict)  # what lies in the root and is not in the index

    @property
    def is_packed(self) -> bool:
        """Are these shards that this project wrote, rather than a tree or tar files of others?"""
        return not self.folders

    @property
    def num_classes(self) -> int:
        return len(self.synsets)

    def unscored_classes(self) -> list[str]:
        """Classes without a validation image, in label order; none where there is no validation split."""
        if "val" not in self.splits:
            return []
        scored = set(np.unique(self.splits["val"].records["label"]).tolist())
        return [name for label, name in enumerate(self.synsets) if label not in scored]


def safe_join(root: Path, name: str) -> Path:
    """`root / name`, or ValueError if `name` is absolute or climbs out of `root`."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not name:
        raise ValueError(f"name {name!r} would leave the folder {root}")
    return root / pure


def compute_fingerprint(
    synsets: Sequence[str], splits: dict[str, np.ndarray], restart: dict[str, np.ndarray] | None = None
) -> str:
    """xxh3_128 (hex) over classes and, split by split in name order, each record's digest, size and label.

    Where the bytes lie is left out: a tree and the shards packed from it unchanged have the same fingerprint. So do
    shards with restart markers (`restart`: split -> [n] of RESTART): digest and size are the original's.
    """
    state = xxhash.xxh3_128(json.dumps(list(synsets)).encode())
    for name in sorted(splits):
        records = splits[name]
        state.update(f"{name}:{len(records)}".encode())
        originals = (restart or {}).get(name, records)
        for column in ("digest", "size", "width", "height", "label"):
            of = originals if column in ("digest", "size") else records
            state.update(np.ascontiguousarray(of[column]).data)
    return state.hexdigest()


def list_files(split: dict[str, Any]) -> list[str]:
    """The files of a split, from its entry in the index's main file."""
    return [split[key] for key in ("records", "names", "restart") if key in split]


def index_folder(root: Path) -> Path:
    """The default folder of the index of a data root."""
    return root / FOLDER


def locate_index(data: DataConfig, data_root: str | None = None, index: str | None = None) -> Path:
    """The folder of the index that a configuration means: `data.index`, or else the default one of the data root.

    data_root: where the data lies now; default: `data.root`. index: where the index lies now.
    """
    if index:
        return Path(index).expanduser()
    if data.index and not data_root:
        return Path(data.index).expanduser()
    return index_folder(Path(data_root or data.root).expanduser())


def has_index(folder: Path) -> bool:
    """Is there an index in this folder, sound or not?"""
    return (folder / MAIN_FILE).exists()


def open_index(folder: Path) -> Index:
    """Open an index in milliseconds, whatever its size. Raises UserError if it is missing or damaged."""
    path = folder / MAIN_FILE
    again = "build it again with: pipeline index ROOT"
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no index at {path}; {again}") from None
    except (OSError, ValueError) as error:
        _refuse_absence(error, path)
        raise UserError(f"index {path} can't be read ({error}); {again}") from error
    try:
        if meta["format"] != FORMAT:
            raise UserError(f"index {path} has format {meta['format']}, this version reads {FORMAT}; {again}")
        root = (folder / meta["root"]).resolve()
        splits = Splits(root)
        for name, entry in meta["splits"].items():
            records = np.load(safe_join(folder, entry["records"]), mmap_mode="r", allow_pickle=False)
            if records.dtype != RECORD or records.shape != (entry["count"],):
                raise ValueError(f"{entry['records']} holds other records than the index says")
            names_path = safe_join(folder, entry["names"])
            size = names_path.stat().st_size
            expected = int(records["name_offset"][-1] + records["name_length"][-1]) if len(records) else 0
            if size != expected:
                raise ValueError(f"{entry['names']} has {size} bytes instead of {expected}")
            names = np.memmap(names_path, np.uint8, "r") if size else np.zeros(0, np.uint8)
            splits[name] = Split(root, records, names, tuple(map(str, entry["shards"])), _open_restart(folder, entry))
        synsets, words = zip(*((str(s), str(w)) for s, w in meta["classes"]), strict=True)
        folders = {str(k): int(v) for k, v in meta["folders"].items()}
        left_out = _read_left_out(meta.get("left_out", {}))
        return Index(folder, root, synsets, words, splits, str(meta["fingerprint"]), folders, left_out)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, SyntaxError, TokenError) as error:
        if isinstance(error, UserError):
            raise
        _refuse_absence(error, path)
        raise UserError(f"index {path} is damaged ({error}); {again}") from error


def _refuse_absence(error: Exception, path: Path) -> None:
    """TransientError where the disk or its server is away for a moment: nothing is to be built again."""
    if isinstance(error, OSError) and error.errno in PASSING:
        raise explain_read(error, error.filename or path) from error


def _read_left_out(found: dict) -> LeftOut:
    return {
        str(split): {str(reason): {"count": int(n["count"]), "first": str(n["first"])} for reason, n in reasons.items()}
        for split, reasons in found.items()
    }


def _open_restart(folder: Path, entry: dict[str, Any]) -> np.ndarray | None:
    """The RESTART records of a split, if its entry in the index's main file names any."""
    if "restart" not in entry:
        return None
    restart = np.load(safe_join(folder, entry["restart"]), mmap_mode="r", allow_pickle=False)
    if restart.dtype != RESTART or restart.shape != (entry["count"],):
        raise ValueError(f"{entry['restart']} holds other records than the index says")
    return restart


def is_current(index: Index, places: Iterable[Path] = ()) -> bool:
    """Has no scanned folder gained, lost or renamed an entry, and were the folders `places` scanned too?

    A file rewritten in place does not touch its folder: `verify` finds it, and so does the loader's digest check.
    Shards are always current.
    """
    try:
        return all(os.path.relpath(place, index.root) in index.folders for place in places) and all(
            (index.root / name).stat().st_mtime_ns == mtime for name, mtime in index.folders.items()
        )
    except OSError:
        return False


def is_sound(index: Index) -> bool:
    """Are all records and names unchanged since they were written, and does the fingerprint match? This reads all."""
    records = {name: split.records for name, split in index.splits.items()}
    restart = {name: split.restart for name, split in index.splits.items() if split.restart is not None}
    names = [split.names for split in index.splits.values() if isinstance(split.names, np.memmap)]
    named = [array for array in names if "-names-" in str(array.filename)]  # of older versions: not by their content
    return compute_fingerprint(index.synsets, records, restart) == index.fingerprint and all(
        xxhash.xxh3_64_hexdigest(array.view(np.uint8).data) == Path(str(array.filename)).stem.rpartition("-")[2]
        for array in (*records.values(), *restart.values(), *named)
        if isinstance(array, np.memmap)
    )


def open_sound(folder: Path) -> Index:
    """Open an index that labels and windows are taken from: as `open_index`, and its records are checked (0.3 s for
    ImageNet). Raises UserError where they have changed, too."""
    index = open_index(folder)
    check_sound(index)
    return index


def check_sound(index: Index) -> None:
    """Raises UserError where the records of an index have changed since they were written."""
    if not is_sound(index):
        again = "run the same pack or stage command" if index.is_packed else "build it again with: pipeline index ROOT"
        raise UserError(f"index {index.folder} is damaged (its records were changed); {again}")
