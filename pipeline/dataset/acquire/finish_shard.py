"""The last step of `fetch --pack`: a shard whose members are all in place is checked from disk and named.

With restart markers it is written again, transcoded, and what was fetched is removed: each process needs the space of
one shard more.
"""

import contextlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import xxhash

from pipeline.dataset.disk import explain
from pipeline.dataset.index.decode import decode_fully
from pipeline.dataset.shards.format import BLOCK, Sample, ShardWriter, make_row, temporary_path
from pipeline.dataset.shards.records import shard_name, write_records
from pipeline.dataset.shards.transcode import transcode
from pipeline.errors import TransientError

if TYPE_CHECKING:
    from pipeline.dataset.acquire.fetch_pack import Shard


@dataclass(frozen=True)
class FinishTask:
    """A shard whose members are all in place. sizes, crcs: [n], by their places. restart: as in `Options`."""

    dest: Path
    shard: "Shard"
    sizes: np.ndarray
    crcs: np.ndarray
    restart: int | None = None

    @property
    def path(self) -> Path:
        return temporary_path(self.dest, self.shard.split, self.shard.number)


def finish_shard(task: FinishTask) -> tuple[int, list[str]]:
    """Check a shard from disk and give it its final name: (samples, members that do not decode).

    Raises TransientError where the disk does not hold what was written; the shard is removed then, to be fetched again.
    """
    bad: list[str] = []
    try:
        with task.path.open("r+b") as file:
            file.truncate(task.shard.size)
            (_keep if task.restart is None else _transcode)(task, file, bad)
        if not bad:
            task.path.unlink(missing_ok=True)
    except OSError as error:
        raise explain(error, task.path) from error
    return len(task.shard.numbers), bad


def _keep(task: FinishTask, file: BinaryIO, bad: list[str]) -> None:
    """The shard as it was fetched, checked and renamed."""
    rows, names, shard = [], [], task.shard
    for name, place, sample in _read_samples(task, file, bad):
        rows.append(make_row(sample, place + BLOCK))
        names.append(name)
    os.fsync(file.fileno())
    if not bad:
        write_records(task.dest, shard.split, shard.number, rows, names, [])
        task.path.replace(task.dest / shard_name(shard.split, shard.number))


class _DoNotKeep(Exception):
    """Images do not decode: the shard that is being written is not to be kept."""


def _transcode(task: FinishTask, file: BinaryIO, bad: list[str]) -> None:
    """The shard written again, with restart markers: as `pack --restart` writes it."""
    assert task.restart is not None
    shard, path = task.shard, task.path.with_name(f".marked{task.path.name}")
    with contextlib.suppress(_DoNotKeep), ShardWriter(task.dest, shard.split, shard.number, True, path) as writer:
        for _, _, sample in _read_samples(task, file, bad):
            if not bad:
                original = xxhash.xxh3_64_intdigest(sample.data), len(sample.data)
                data = transcode(sample.data, task.restart) or sample.data
                writer.add(replace(sample, data=data, original=original))
        if bad:
            raise _DoNotKeep


def _read_samples(task: FinishTask, file: BinaryIO, bad: list[str]) -> Iterator[tuple[str, int, Sample]]:
    """Member name, place and sample of each member, compared with the archive's CRC-32; names of those that do not
    decode are added to `bad`."""
    shard = task.shard
    fields = zip(shard.places.tolist(), task.sizes.tolist(), task.crcs.tolist(), strict=True)
    for i, (place, size, crc) in enumerate(fields):
        file.seek(place)
        header, data = file.read(BLOCK), file.read(size)
        if zlib.crc32(data) != crc:
            task.path.unlink()
            raise TransientError(f"{task.path} does not hold what was written; run the same command again")
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        try:
            width, height = decode_fully(data)
        except (OSError, ValueError):
            bad.append(name)
            continue
        key, _, suffix = name.rpartition(".")
        yield name, place, Sample(key, suffix, data, int(shard.labels[i]), width, height, 2 * int(shard.items[i]) + 1)
