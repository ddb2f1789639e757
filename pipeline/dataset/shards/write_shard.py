"""One shard, written from an indexed tree or from other shards, by a process of its own."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from pipeline.dataset.index.decode import decode_fully
from pipeline.dataset.index.index import Index, open_index, safe_join
from pipeline.dataset.shards.format import Sample, ShardWriter, image_suffix
from pipeline.dataset.shards.plan import Extra, Options, make_key, read_checked
from pipeline.dataset.shards.reencode import reencode
from pipeline.dataset.shards.transcode import transcode
from pipeline.dataset.workers import read_ahead
from pipeline.errors import UserError


@dataclass(frozen=True)
class Task:
    """One shard to write; everything that a process of its own needs."""

    index: Path
    fingerprint: str
    dest: Path
    split: str
    number: int
    items: np.ndarray
    extras: tuple[Extra, ...]
    twins: frozenset[int]
    options: Options


_open_once = functools.lru_cache(1)(open_index)


def write_shard(task: Task) -> int:
    """Write one shard; returns its number of items."""
    index = open_source(task)
    restart = task.options.restart is not None or index.splits[task.split].restart is not None
    with ShardWriter(task.dest, task.split, task.number, restart) as writer:
        fill_shard(writer, task, index, read_ahead(functools.partial(_read, index, task), task.items.tolist()))
    return len(task.items)


def open_source(task: Task) -> Index:
    """The index of what is packed. UserError where it is another than at the start."""
    index = _open_once(task.index)
    if index.fingerprint != task.fingerprint:
        raise UserError(f"index {task.index} changed during the run; run the same command again")
    return index


def fill_shard(writer: ShardWriter, task: Task, index: Index, contents: Iterable[bytes | OSError]) -> None:
    """Add the items of a shard. contents: the bytes of each, or the error in their place."""
    split, side, restart = index.splits[task.split], task.options.side_of(task.split), task.options.restart
    for item, data in zip(task.items.tolist(), contents, strict=True):
        if item >= len(split):
            _save(writer, index, task.extras[item - len(split)], data, item in task.twins, side, task.options)
            continue
        assert isinstance(data, bytes)
        record, name = split.records[item], split.name(item)
        width, height, original = int(record["width"]), int(record["height"]), split.identity(item)
        if side is not None and min(width, height) > side:
            data, width, height = reencode(data, side, task.options.quality)
            original = xxhash.xxh3_64_intdigest(data), len(data)
        if restart is not None:
            data = transcode(data, restart) or data
        label = int(record["label"])
        is_key = index.is_packed and split.shards
        key = name.rpartition(".")[0] if is_key else make_key(index.synsets[label], name, item in task.twins)
        writer.add(Sample(key, image_suffix(data, name), data, label, width, height, 2 * item + 1, original))


def _read(index: Index, task: Task, item: int) -> bytes | OSError:
    split = index.splits[task.split]
    if item < len(split):
        return read_checked(index, task.split, item)
    extra = task.extras[item - len(split)]
    try:
        if extra.place is None:
            return safe_join(index.root, extra.name).read_bytes()
        tar, offset, size = extra.place
        with safe_join(index.root, tar).open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        return error


def _save(
    writer: ShardWriter,
    index: Index,
    extra: Extra,
    content: bytes | OSError,
    is_twin: bool,
    side: int | None,
    options: Options,
) -> None:
    """Add what can be seen of a damaged image, or note that nothing can."""
    note = {"file": extra.file, "class": index.synsets[extra.label]}
    try:
        if isinstance(content, OSError):
            raise content
        data, width, height = reencode(content, side, options.quality, damaged=True)
        decode_fully(data)
    except (OSError, ValueError) as error:
        reason = str(error)[:200] if isinstance(error, ValueError) else error.strerror or "nothing to decode"
        writer.notes.append({**note, "done": "left out", "reason": reason})
        return
    writer.notes.append({**note, "done": "re-encoded"})
    key = make_key(index.synsets[extra.label], extra.name, is_twin)
    original = xxhash.xxh3_64_intdigest(data), len(data)
    if options.restart is not None:
        data = transcode(data, options.restart) or data
    writer.add(Sample(key, "jpg", data, extra.label, width, height, extra.order, original))
