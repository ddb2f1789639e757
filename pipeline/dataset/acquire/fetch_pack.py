"""Members fetched directly into tar shards, without a tree: byte for byte the shards that `pack` would write.

Every size is known from the archive's directory, so every sample's place in its shard is known before the first byte
comes. Streams write members where they belong, in any order; a kill loses one member a stream. At the end each shard
is read once: every image decoded in full, every CRC-32 checked again on what is on disk.
"""

import contextlib
import json
import os
import sys
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from pipeline.dataset import imagenet
from pipeline.dataset.acquire.catalog import Catalog, iter_names
from pipeline.dataset.acquire.selection import BASE, Selection
from pipeline.dataset.disk import explain
from pipeline.dataset.index.decode import decode_fully
from pipeline.dataset.index.index import PACKED, RECORD, Index, Split, index_folder
from pipeline.dataset.index.scan import UNREADABLE
from pipeline.dataset.index.write import pack_names
from pipeline.dataset.shards.format import (
    BLOCK,
    Sample,
    image_suffix,
    is_whole,
    make_row,
    merge_shards,
    remove_records,
    shard_name,
    tar_header,
    whole_size,
    write_records,
)
from pipeline.dataset.shards.format import STATE as SHARD_STATE
from pipeline.dataset.shards.plan import Options, make_key, make_plan
from pipeline.dataset.workers import map_in_order
from pipeline.errors import TransientError, UserError
from pipeline.files import atomic_write
from pipeline.progress import Progress

LONGEST_NAME = 60  # of a file: a key must fit into one block of tar header


@dataclass(frozen=True)
class Shard:
    """One shard to be. Arrays [n] over its samples, in the order of their places.

    numbers: in the archive's directory; places: of the sample's header in the shard; items: in the index's order.
    """

    split: str
    number: int
    numbers: np.ndarray
    places: np.ndarray
    items: np.ndarray
    labels: np.ndarray
    size: int


def _sample_bytes(sizes: np.ndarray) -> np.ndarray:
    """Bytes of samples in a shard: a header, the image filled up to a block, the label's header and block."""
    return BLOCK + (sizes + BLOCK - 1) // BLOCK * BLOCK + 2 * BLOCK


def temporary_path(dest: Path, split: str, number: int) -> Path:
    """Where a shard is made; `pack` uses the same name."""
    return dest / f".{shard_name(split, number)}.tmp"


class ShardPlan:
    """Where each image of a selection goes. `numbers` [n]: all of them, in the archive's directory."""

    def __init__(self, catalog: Catalog, selection: Selection, wanted: dict[str, np.ndarray], options: Options):
        self.directory, self.options = catalog.directory, options
        synsets: set[str] = set()
        named: dict[str, list[tuple[str, str, int]]] = {}
        for split, numbers in wanted.items():
            if len(numbers):
                names = iter_names(self.directory, numbers)
                named[split] = sorted(
                    (*_class_and_file(name, selection), number)
                    for name, number in zip(names, numbers.tolist(), strict=True)
                )
                synsets |= {synset for synset, _, _ in named[split]}
        self.synsets = sorted(synsets)
        self.shards = list(self._deal(named))
        self.numbers = np.concatenate([shard.numbers for shard in self.shards])
        self._place = np.full(len(self.directory), -1, np.int64)
        self._shard = np.zeros(len(self.directory), np.int32)
        for i, shard in enumerate(self.shards):
            self._place[shard.numbers], self._shard[shard.numbers] = shard.places, i
        self.selection = selection
        made_from = json.dumps([self.directory.fingerprint, asdict(options), self.synsets, sorted(wanted)])
        self.fingerprint = xxhash.xxh3_64_intdigest(made_from.encode() + self.numbers.tobytes())

    def _deal(self, named: dict[str, list[tuple[str, str, int]]]) -> Iterable[Shard]:
        self.label_of = label_of = {synset: label for label, synset in enumerate(self.synsets)}
        splits, sizes = {}, self.directory.entries["size"]
        for split, rows in named.items():
            records = np.zeros(len(rows), RECORD)
            records["size"] = sizes[[number for _, _, number in rows]]
            records["label"] = [label_of[synset] for synset, _, _ in rows]
            records["shard"] = -1
            names = [f"{BASE}/{split}/{synset}/{file}" for synset, file, _ in rows]
            splits[split] = Split(Path(), records, pack_names(names, records))
        index = Index(Path(), Path(), tuple(self.synsets), tuple(self.synsets), splits, "", {})
        plan = make_plan(index, self.options, {})
        self.twins = {split: plan.twins[split] for split in splits}
        self.twin_numbers = {named[split][item][2] for split, items in plan.twins.items() for item in items}
        for split, number in plan.shards():
            items = plan.of_shard(split, number)
            numbers = np.array([named[split][item][2] for item in items.tolist()], np.int64)
            lengths = _sample_bytes(sizes[numbers].astype(np.int64))
            ends = np.cumsum(lengths)
            labels = splits[split].records["label"][items]
            yield Shard(split, number, numbers, ends - lengths, items, labels, whole_size(int(ends[-1])))

    def counts(self) -> dict[str, int]:
        """Split -> number of shards."""
        return {split: sum(shard.split == split for shard in self.shards) for split in self.twins}

    def locate(self, number: int) -> tuple[Shard, int]:
        """The shard of a member and its place there."""
        return self.shards[self._shard[number]], int(self._place[number])

    def make_sample(self, number: int, name: str, data: bytes) -> tuple[str, int]:
        """(member name in the shard, label) of an image."""
        synset, file = _class_and_file(name, self.selection)
        split = "train" if name.startswith(f"{BASE}/train/") else "val"
        key = make_key(synset, f"{BASE}/{split}/{synset}/{file}", number in self.twin_numbers)
        return f"{key}.{image_suffix(data, name)}", self.label_of[synset]


def _class_and_file(name: str, selection: Selection) -> tuple[str, str]:
    """(synset, file name) of an image; UserError where its class is not known or its name too long."""
    folder, _, file = name.rpartition("/")
    if len(file.encode()) > LONGEST_NAME:
        raise UserError(f"{name}: the name is too long for --pack; fetch without it, then: pipeline pack")
    if name.startswith(f"{BASE}/train/"):
        return folder.rpartition("/")[2], file
    synset = selection.val_labels.get(file.rpartition(".")[0])
    if synset is None:
        raise UserError(f"image {name} has no row in {imagenet.VAL_SOLUTION}, so --pack does not know its class")
    return synset, file


class ShardPatcher:
    """The `transfer.Writer` that puts members into their places in the shards being made."""

    def __init__(self, dest: Path, plan: ShardPlan):
        self.dest, self.plan = dest, plan

    def write(self, _stream: int, number: int, name: str, chunks: Iterable[bytes]) -> int:
        """Write one sample; what `chunks` raises leaves no trace."""
        data = b"".join(chunks)
        shard, place = self.plan.locate(number)
        member, label = self.plan.make_sample(number, name, data)
        text = str(label).encode()
        key = member.rpartition(".")[0]
        sample = [tar_header(member, len(data)), data, bytes(-len(data) % BLOCK)]
        sample += [tar_header(f"{key}.cls", len(text)), text, bytes(-len(text) % BLOCK)]
        whole = b"".join(sample)
        path = temporary_path(self.dest, shard.split, shard.number)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                view = memoryview(whole)
                while view:
                    written = os.pwrite(descriptor, view, place)
                    view, place = view[written:], place + written
            finally:
                os.close(descriptor)
        except OSError as error:
            raise explain(error, path) from error
        return len(data)


@dataclass(frozen=True)
class FinishTask:
    """A shard whose members are all in place; `crcs` [n] as in its `Shard`."""

    dest: Path
    shard: Shard
    sizes: np.ndarray
    crcs: np.ndarray


def finish_shard(task: FinishTask) -> tuple[int, list[str]]:
    """Check a shard from disk and give it its final name: (samples, members that do not decode).

    Raises TransientError where the disk does not hold what was written; the shard is removed then, to be fetched anew.
    """
    shard, rows, names, bad = task.shard, [], [], []
    path = temporary_path(task.dest, shard.split, shard.number)
    try:
        with path.open("r+b") as file:
            file.truncate(shard.size)
            fields = zip(shard.places.tolist(), task.sizes.tolist(), task.crcs.tolist(), strict=True)
            for i, (place, size, crc) in enumerate(fields):
                file.seek(place)
                header, data = file.read(BLOCK), file.read(size)
                if zlib.crc32(data) != crc:
                    path.unlink()
                    raise TransientError(f"{path} does not hold what was written; run the same command again")
                name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
                try:
                    width, height = decode_fully(data)
                except (OSError, ValueError):
                    bad.append(name)
                    continue
                sample = Sample("", "", data, int(shard.labels[i]), width, height, 2 * int(shard.items[i]) + 1)
                rows.append(make_row(sample, place + BLOCK))
                names.append(name)
            os.fsync(file.fileno())
        if not bad:
            write_records(task.dest, shard.split, shard.number, rows, names, [])
            path.replace(task.dest / shard_name(shard.split, shard.number))
    except OSError as error:
        raise explain(error, path) from error
    return len(shard.numbers), bad


class Packing:
    """The shards of one selection in `dest`: what is whole, what is missing, and the end. Restartable anywhere."""

    def __init__(self, dest: Path, plan: ShardPlan):
        self.dest, self.plan = dest, plan

    def prepare(self) -> None:
        """Note in `dest` what is made there. UserError where it holds other shards."""
        marker = {"options": asdict(self.plan.options), "shards": self.plan.counts(), "complete": False}
        found = {}
        with contextlib.suppress(FileNotFoundError):
            found = json.loads((self.dest / PACKED).read_bytes())
        if found and any(found.get(key) != marker[key] for key in ("options", "shards")):
            raise UserError(f"{self.dest} holds other shards than these; give another folder or remove it")
        self._write_marker({"source": None, **found, **marker})
        for shard in self.plan.shards:  # of a set that was complete once: its records are gone, so it is checked again
            final = self.dest / shard_name(shard.split, shard.number)
            if final.exists() and not is_whole(self.dest, shard.split, shard.number):
                final.replace(temporary_path(self.dest, shard.split, shard.number))

    def _write_marker(self, marker: dict) -> None:
        atomic_write(self.dest / PACKED, json.dumps(marker, indent=1) + "\n")

    def find_whole(self, trusted: np.ndarray) -> np.ndarray:
        """Which of `plan.numbers` are in their places: bool [n]. `trusted`: member numbers that the journal noted."""
        vouched = np.isin(self.plan.numbers, trusted)
        parts, first = [], 0
        for shard in self.plan.shards:
            here = vouched[first : first + len(shard.numbers)]
            first += len(shard.numbers)
            if is_whole(self.dest, shard.split, shard.number):
                here = np.ones_like(here)
            elif not temporary_path(self.dest, shard.split, shard.number).exists():
                here = np.zeros_like(here)
            parts.append(here)
        return np.concatenate(parts)

    def needed(self, whole: np.ndarray) -> int:
        """Bytes still to be written."""
        sizes = self.plan.directory.entries["size"][self.plan.numbers[~whole]].astype(np.int64)
        return int(_sample_bytes(sizes).sum()) + len(self.plan.shards) * tarfile.RECORDSIZE

    def finish(self) -> Index:
        """Check and name every shard, and make the index. UserError where an image does not decode."""
        entries, bad = self.plan.directory.entries, []
        todo = [shard for shard in self.plan.shards if not is_whole(self.dest, shard.split, shard.number)]
        tasks = (
            FinishTask(self.dest, shard, entries["size"][shard.numbers], entries["crc"][shard.numbers])
            for shard in todo
        )
        (self.dest / SHARD_STATE).mkdir(exist_ok=True)
        with Progress("Checking shards", sum(len(shard.numbers) for shard in todo), "images") as progress:
            for count, damaged in map_in_order(finish_shard, tasks):
                bad += damaged
                progress.advance(count)
        if bad:
            raise UserError(
                f"{self.dest} is complete, but {len(bad)} images do not decode, though they are as the archive has "
                f"them ({', '.join(bad[:3])}); fetch without --pack, then: pipeline pack --unreadable skip"
            )
        words = imagenet.read_synset_words(self.dest)
        made, _ = merge_shards(self.dest, [(s, words.get(s, s)) for s in self.plan.synsets], self.plan.counts())
        empty: dict[str, list] = {split: [] for split in self.plan.counts()}
        atomic_write(self.dest / UNREADABLE, json.dumps(empty, indent=1) + "\n")
        marker = json.loads((self.dest / PACKED).read_bytes())
        self._write_marker({**marker, "source": made.fingerprint, "complete": True})
        remove_records(self.dest)
        print(f"{index_folder(self.dest)}: fingerprint {made.fingerprint}", file=sys.stderr)
        return made
