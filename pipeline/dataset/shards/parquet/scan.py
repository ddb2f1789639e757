"""The images of Hugging Face parquet files, by row: listed, indexed, and read row group by row group.

In the index of parquet files a record's shard is a file, and its offset a row there.
"""

import bisect
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.dataset.disk import explain_read
from pipeline.dataset.imagenet import SYNSET
from pipeline.dataset.index.decode import FileContent, ScannedFile, inspect
from pipeline.dataset.index.index import Index, is_current
from pipeline.dataset.index.label_text import label_text
from pipeline.dataset.index.left_out import Tally
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.scan import locked_folder, open_previous, scan_listings
from pipeline.dataset.index.scan_split import Place, Reader
from pipeline.dataset.index.tar_listing import TarSplit, drop_unlabeled, make_listings, name_classes
from pipeline.dataset.index.tar_members import Member
from pipeline.dataset.names import LFS_POINTER
from pipeline.dataset.workers import map_in_order
from pipeline.errors import TransientError, UserError

_LABELS = ("label", "labels", "cls", "class", "fine_label", "target")
_WITH_CLASS = re.compile(r"(?P<stem>.+)_(?P<synset>n\d{8})(?P<suffix>\.\w+)")  # n01440764_18_n01440764.JPEG
_FEW = 4  # files, below which starting processes costs more than it saves
_BATCH = 64  # rows held at once


class File(NamedTuple):
    """A parquet file: the first row of each row group and behind the last, the columns of bytes, paths (None: there is
    none) and labels, and the names of its classes by number, empty where it has none."""

    path: str
    firsts: tuple[int, ...]
    image: str
    name: str | None
    label: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class _Listed:
    """The rows of a file, without their images."""

    file: File
    members: list[Member]


def _parquet() -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"parquet files require pyarrow ({error}); install it with: pip install pyarrow") from None
    return parquet


def _explain(path: str, error: Exception, what: str) -> UserError | TransientError:
    """A file can't be read: What pyarrow says without an error number is damage; else it is the disk."""
    try:
        if isinstance(error, OSError) and error.errno:
            raise error
        with Path(path).open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as failure:
        return explain_read(failure, path)
    if head == LFS_POINTER:
        return UserError(f"{path} is a pointer of Git LFS, not the file itself; run in its folder: git lfs pull")
    text = " ".join(str(error).split())[:200]
    return UserError(f"{path} {what} ({text}); download that file again, then run the same command again")


@functools.lru_cache(2)
def _open(path: str, _mtime_ns: int) -> Any:
    return _parquet().ParquetFile(path, page_checksum_verification=True)


def stat_file(path: str | Path) -> os.stat_result:
    """What the file system says of a file. UserError or TransientError where it can't be read."""
    try:
        return os.stat(path)
    except OSError as error:
        raise explain_read(error, path) from error


def open_file(path: str) -> File:
    """The columns and row groups of a file. UserError where it holds no images with labels, or is no parquet file."""
    _parquet()
    try:
        with Path(path).open("rb") as file:  # a missing permission is no damage
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        raise explain_read(error, path) from error
    return _describe(path, mtime_ns)


@functools.lru_cache(512)
def _describe(path: str, mtime_ns: int) -> File:
    import pyarrow as pa

    try:
        file = _open(path, mtime_ns)
        schema = file.schema_arrow
        fields = {field.name: field.type for field in schema}
        of_struct = [n for n, kind in fields.items() if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0]
        of_bytes = [n for n, kind in fields.items() if pa.types.is_binary(kind) or pa.types.is_large_binary(kind)]
        label = next((name for name in _LABELS if name in fields), None)
        if not (of_struct or of_bytes) or label is None:
            raise UserError(
                f"{path} has the columns {', '.join(fields)}; expected one of image bytes and label, as "
                "Hugging Face's image data sets have them"
            )
        image = f"{of_struct[0]}.bytes" if of_struct else of_bytes[0]
        has_path = of_struct and fields[of_struct[0]].get_field_index("path") >= 0
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        words = about.get("info", {}).get("features", {}).get(label, {}).get("names") or []
        firsts = [0]
        for number in range(file.num_row_groups):
            firsts.append(firsts[-1] + file.metadata.row_group(number).num_rows)
        name = f"{of_struct[0]}.path" if has_path else None
        return File(path, tuple(firsts), image, name, label, tuple(map(str, words)))
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on damaged bytes pyarrow raises many kinds
        raise _explain(path, error, "can't be read as parquet") from error


def group_of(file: File, row: int) -> int:
    """The number of the row group that holds a row."""
    return bisect.bisect_right(file.firsts, row) - 1


def read_rows(path: str, column: str, group: int | None = None) -> Iterator[Any]:
    """The values of a column, such as `image.bytes`, of one row group or of all, some rows at a time.

    UserError that names the file where its bytes are damaged.
    """
    inner = column.partition(".")[2]
    try:
        file = _open(path, os.stat(path).st_mtime_ns)
        groups = range(file.num_row_groups) if group is None else [group]
        for batch in file.iter_batches(_BATCH, row_groups=list(groups), columns=[column]):
            for value in batch.column(0).to_pylist():
                yield value[inner] if isinstance(value, dict) else value
    except MemoryError:
        raise
    except Exception as error:
        where = "" if group is None else f" in row group {group}"
        raise _explain(path, error, f"is damaged{where}") from error


def _list_file(path: str) -> _Listed:
    file, members = open_file(path), []
    names = [None] * file.firsts[-1] if file.name is None else list(read_rows(path, file.name))
    labels = list(read_rows(path, file.label))
    if not len(names) == len(labels) == file.firsts[-1]:
        raise UserError(f"{path} is damaged (its columns differ in length); download that file again")
    for row, (given, label) in enumerate(zip(names, labels, strict=True)):
        name = str(given or "").rpartition("/")[2]
        if not name or not name.isprintable():
            name = f"{Path(path).stem}-{row:07d}.jpg"
        known = [part for part in name.replace(".", "_").replace("-", "_").split("_") if SYNSET.fullmatch(part)]
        with_class = _WITH_CLASS.fullmatch(name)
        if with_class is not None:  # as Hugging Face writes ImageNet's names
            name = with_class["stem"] + with_class["suffix"]
        members.append(Member(name, row, 0, label_text(label), known[-1] if known else "", ""))
    return _Listed(file, members)


def _unify_labels(listed: list[_Listed]) -> tuple[str, ...]:
    """The names of the classes by number, as all files list them. Where their lists differ, labels become names, in
    place, and nothing is returned. UserError where that can't be done."""
    lists = {item.file.words: item.file.path for item in listed if item.file.words}
    if len(lists) <= 1:
        return next(iter(lists), ())
    (_, first), (_, second) = list(lists.items())[:2]
    for words, path in ((item.file.words, item.file.path) for item in listed):
        if not words or len(set(words)) < len(words):
            why = "gives its classes no names" if not words else "gives two classes the same name"
            raise UserError(
                f"the lists of classes of {first} and {second} differ, and {path} {why}; get files of one set"
            )
    for item in listed:
        words = item.file.words
        for i, member in enumerate(item.members):
            if member.label is not None:
                if not member.label.isdecimal() or int(member.label) >= len(words):
                    raise UserError(f"{item.file.path} has the label {member.label}, which its list of classes lacks")
                item.members[i] = member._replace(label=words[int(member.label)])
    return ()


def _look_at(places: list[Place]) -> list[ScannedFile]:
    """Decode some rows of one row group."""
    path = places[0][0]
    file = open_file(path)
    group = group_of(file, places[0][1])
    mtime_ns = stat_file(path).st_mtime_ns
    wanted, found = {row for _, row, _ in places}, {}
    for row, data in enumerate(read_rows(path, file.image, group), file.firsts[group]):
        if row in wanted:
            content = FileContent(data, mtime_ns) if data else FileContent(b"", mtime_ns, "no bytes in its row")
            found[row] = inspect(content)
    return [found[row] for _, row, _ in places]


def scan_parquet(root: Path, files: dict[str, tuple[Path, ...]], folder: Path, processes: int) -> Index:
    """The index of parquet files, in `folder`; one that is still valid is only opened.

    Raises UserError for files without images and labels, lists of classes that don't fit, and as `scan_listings` does.
    """
    with locked_folder(folder):
        paths = [path for of_split in files.values() for path in of_split]
        previous = open_previous(folder)
        noted = {os.path.relpath(path, root) for path in paths}
        if previous is not None and previous.root == root and noted == set(previous.folders) and is_current(previous):
            entries = itertools.chain.from_iterable(read_unreadable(folder).values())
            if all({"tar", "offset", "digest"} <= set(entry) for entry in entries):  # older versions noted less
                return previous
        mtimes = {path: stat_file(path).st_mtime_ns for path in paths}
        names = [str(path) for path in paths]
        listed = list(map_in_order(_list_file, names, processes if len(paths) > _FEW else 1))
        words: Sequence[str] = _unify_labels(listed)
        rows = {item.file.path: item.members for item in listed}
        splits = {}
        for split, of_split in files.items():
            members = [(number, member) for number, path in enumerate(of_split) for member in rows[str(path)]]
            noted_times = {os.path.relpath(path, root): mtimes[path] for path in of_split}
            splits[split] = TarSplit(of_split, members, Tally(), noted_times)
            drop_unlabeled(splits[split], root)
            if not members:
                raise UserError(f"{of_split[0]} has no labeled row; it may be a test split: leave it out")
        class_of = name_classes(splits, words)
        numbers = {int(label): name for label, name in class_of.items() if label.isdecimal()}
        spoken = {numbers[number]: text for number, text in enumerate(words) if number in numbers}
        file_of = {os.path.relpath(item.file.path, root): item.file for item in listed}
        reader = Reader(_look_at, lambda place: (place[0], group_of(file_of[place[0]], place[1])))
        homes = {split: of_split[0] for split, of_split in files.items()}
        listings = make_listings(splits, root, class_of)
        return scan_listings(root, folder, listings, homes, previous, processes, spoken, reader)
