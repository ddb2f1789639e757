"""Members fetched directly into tar shards, without a tree: byte for byte the shards that `pack` would write.

Every size is known from the archive's directory, so every sample's place in its shard is known before the first byte
comes. Streams write members where they belong, in any order; a kill loses one member a stream. At the end each shard
is read once (`finish_shard.py`): every image decoded in full, every CRC-32 checked again on what is on disk.
"""

import json
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from pipeline.counts import count
from pipeline.dataset import imagenet
from pipeline.dataset.acquire.catalog import Catalog, iter_names
from pipeline.dataset.acquire.finish_shard import FinishTask, finish_shard
from pipeline.dataset.acquire.selection import BASE, Selection
from pipeline.dataset.index.index import PACKED, RECORD, Index, Split, index_folder, open_index
from pipeline.dataset.index.notes import UNREADABLE_FILE
from pipeline.dataset.index.write import pack_names
from pipeline.dataset.shards.format import BLOCK, image_suffix, temporary_path, whole_size
from pipeline.dataset.shards.in_place import sample_members, write_in_place
from pipeline.dataset.shards.marker import find_complete, read_marker
from pipeline.dataset.shards.plan import RESTART_GROWTH, Options, make_key, make_plan
from pipeline.dataset.shards.records import STATE as SHARD_STATE
from pipeline.dataset.shards.records import exists, is_whole, merge_shards, remove_records, shard_name
from pipeline.dataset.workers import map_in_order
from pipeline.errors import UserError
from pipeline.files import atomic_write
from pipeline.limits import available_cores
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

    def make_sample(self, number: int, name: str, data: bytes) -> bytes:
        """An image as it stands in its shard."""
        synset, file = _class_and_file(name, self.selection)
        split = "train" if name.startswith(f"{BASE}/train/") else "val"
        key = make_key(synset, f"{BASE}/{split}/{synset}/{file}", number in self.twin_numbers)
        return sample_members(key, image_suffix(data, name), data, self.label_of[synset])


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
        write_in_place(self.dest, shard.split, shard.number, self.plan.make_sample(number, name, data), place)
        return len(data)


class Packing:
    """The shards of one selection in `dest`: what is whole, what is missing, and the end. Restartable anywhere."""

    def __init__(self, dest: Path, plan: ShardPlan):
        self.dest, self.plan, self.restart = dest, plan, plan.options.restart
        self.is_mending = False  # only shards that were lost of a set that was complete; its index stays

    def prepare(self) -> None:
        """Note in `dest` what is made there. UserError where it holds other shards."""
        marker = {"options": self.plan.options.marker(), "shards": self.plan.counts(), "complete": False}
        found = read_marker(self.dest)
        difference = self.plan.options.difference(found.get("options"))
        if found and (difference or found.get("shards") != marker["shards"]):
            raise UserError(f"{self.dest} holds other shards than these; give another folder or remove it")
        if self.restart is not None:  # a shard without markers is checked again instead: it is as it was fetched
            complete = find_complete(self.dest)
            self.is_mending = complete is not None and self._is_described_by(complete)
        if self.is_mending:
            return
        self._write_marker({"source": None, **found, **marker})
        for shard in self.plan.shards:  # of a set that was complete once: its records are gone, so it is checked again
            final = self.dest / shard_name(shard.split, shard.number)
            if self.restart is None and final.exists() and not self._is_whole(shard):
                final.replace(temporary_path(self.dest, shard.split, shard.number))

    def _is_described_by(self, index: Index) -> bool:
        """Is this the index of all these shards, with their restart tables?"""
        counts = self.plan.counts()
        return set(index.splits) == set(counts) and all(
            split.restart is not None
            and split.shards == tuple(shard_name(name, number) for number in range(counts[name]))
            and len(split) == sum(len(shard.numbers) for shard in self.plan.shards if shard.split == name)
            for name, split in index.splits.items()
        )

    def _is_whole(self, shard: Shard) -> bool:
        is_there = exists if self.is_mending else is_whole
        return is_there(self.dest, shard.split, shard.number, self.restart is not None)

    def _write_marker(self, marker: dict) -> None:
        atomic_write(self.dest / PACKED, json.dumps(marker, indent=1) + "\n")

    def find_whole(self, trusted: np.ndarray) -> np.ndarray:
        """Which of `plan.numbers` are in their places: bool [n]. `trusted`: member numbers that the journal noted."""
        vouched = np.isin(self.plan.numbers, trusted)
        parts, first = [], 0
        for shard in self.plan.shards:
            here = vouched[first : first + len(shard.numbers)]
            first += len(shard.numbers)
            if self._is_whole(shard):
                here = np.ones_like(here)
            elif not temporary_path(self.dest, shard.split, shard.number).exists():
                here = np.zeros_like(here)
            parts.append(here)
        return np.concatenate(parts)

    def needed(self, whole: np.ndarray) -> int:
        """Bytes still to be written."""
        sizes = self.plan.directory.entries["size"][self.plan.numbers[~whole]].astype(np.int64)
        size = int(_sample_bytes(sizes).sum()) + len(self.plan.shards) * tarfile.RECORDSIZE
        if self.restart is None:
            return size
        at_once = sum(sorted(shard.size for shard in self.plan.shards)[-available_cores() :])  # being transcoded
        return int(RESTART_GROWTH * (size + at_once))

    def finish(self) -> Index:
        """Check and name every shard, and make the index. UserError where an image does not decode."""
        entries, bad = self.plan.directory.entries, []
        todo = [shard for shard in self.plan.shards if not self._is_whole(shard)]
        tasks = (
            FinishTask(self.dest, shard, entries["size"][shard.numbers], entries["crc"][shard.numbers], self.restart)
            for shard in todo
        )
        (self.dest / SHARD_STATE).mkdir(exist_ok=True)
        with Progress("Checking shards", sum(len(shard.numbers) for shard in todo), "images") as progress:
            for checked, damaged in map_in_order(finish_shard, tasks):
                bad += damaged
                progress.advance(checked)
        if bad:
            raise UserError(
                f"{self.dest} is complete, but {count(len(bad), 'image')} can't be decoded, as in the archive "
                f"({', '.join(bad[:3])}); fetch without --pack, then: pipeline pack --unreadable skip"
            )
        for path in self.dest.glob(".*.tmp"):  # of a kill before a fetched shard was removed
            path.unlink()
        if self.is_mending:
            remove_records(self.dest)
            return open_index(index_folder(self.dest))
        words = imagenet.read_synset_words(self.dest)
        made, _ = merge_shards(self.dest, [(s, words.get(s, s)) for s in self.plan.synsets], self.plan.counts())
        empty: dict[str, list] = {split: [] for split in self.plan.counts()}
        atomic_write(self.dest / UNREADABLE_FILE, json.dumps(empty, indent=1) + "\n")
        marker = json.loads((self.dest / PACKED).read_bytes())
        self._write_marker({**marker, "source": made.fingerprint, "complete": True})
        remove_records(self.dest)
        print(f"{index_folder(self.dest)}: fingerprint {made.fingerprint}", file=sys.stderr)
        return made
