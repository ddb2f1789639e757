"""Which sample goes into which shard, under which key: a function of the index and the options alone.

A seeded shuffle deals the samples out, so that sequential readers meet all classes in every shard.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import xxhash

from pipeline.dataset.disk import explain_read
from pipeline.dataset.index.index import Index
from pipeline.dataset.shards.format import SAMPLE_OVERHEAD
from pipeline.dataset.shards.reencode import reencode
from pipeline.errors import UserError
from pipeline.files import PASSING, appears

AUTO_RESTART = 8  # MCUs a restart interval: the files do not grow, as their Huffman tables are optimized, too
RESTART_GROWTH = 1.08  # at most so much larger for restart markers and their tables (an interval of one MCU)
PROBES = 64  # images re-encoded beforehand, to learn how large a shard's samples will be


@dataclass(frozen=True)
class Options:
    """What the bytes of the shards depend on, besides the source. `restart`: MCUs a restart interval; None: without."""

    short_side: int | None = None
    quality: int = 90
    shard_mb: int = 256
    resize_val: bool = False
    unreadable: str = "refuse"
    seed: int = 0
    restart: int | None = None

    def __post_init__(self) -> None:
        limits = {"short_side": (16, 4096), "quality": (1, 100), "shard_mb": (1, 100_000), "seed": (0, 2**63 - 1)}
        limits["restart"] = (1, 65_535)
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} is {value}; give a number from {low} to {high}")

    def marker(self) -> dict[str, Any]:
        """The options as packed folders note them; without `restart` where there is none, as older versions did."""
        return {name: value for name, value in asdict(self).items() if name != "restart" or value is not None}

    def difference(self, noted: Any) -> str:
        """Where these are not the options that a packed folder notes: "restart None instead of 8"; else empty."""
        old = noted if isinstance(noted, dict) else {}
        new = asdict(self)
        return next(
            (f"{name} {old.get(name)} instead of {new[name]}" for name in new if old.get(name) != new[name]), ""
        )

    def side_of(self, split: str) -> int | None:
        """Pixels that the shorter side of this split's images is reduced to; None: they stay as they are."""
        return self.short_side if split == "train" or self.resize_val else None


def parse_restart(restart: Literal["auto"] | int | None) -> int | None:
    """The option `--restart`, in MCUs."""
    return AUTO_RESTART if restart == "auto" else restart


def spell_out_restart(argv: list[str]) -> list[str]:
    """`--restart` without a value means `--restart auto`."""
    out = []
    for i, item in enumerate(argv):
        out.append(item)
        if item == "--restart" and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            out.append("auto")
    return out


@dataclass(frozen=True)
class Extra:
    """An image that the index left out, to be saved as far as it goes.

    file: what it is called in lists; name: the same without its tar file; order: as in `shards.Sample`; place: its tar
    file, offset and bytes, None for a file of its own.
    """

    file: str
    name: str
    label: int
    order: int
    place: tuple[str, int, int] | None = None


def list_extras(index: Index, split: str, unreadable: list[dict]) -> list[Extra]:
    """Where the left-out files of a split belong in the index's order (source sample i has the order 2 i + 1)."""
    if not unreadable:
        return []
    names = list(index.splits[split].iter_names())
    keys = [tuple(name.rpartition("/")[::2]) for name in names]
    labels = index.splits[split].records["label"]
    extras = []
    for entry in sorted(unreadable, key=lambda entry: entry["file"]):
        label = index.synsets.index(entry["class"])
        first, last = np.searchsorted(labels, [label, label + 1])
        name = entry["file"].removeprefix(f"{entry.get('tar')}:")
        key = tuple(name.rpartition("/")[::2])
        place = (entry["tar"], entry["offset"], entry["size"]) if "tar" in entry else None
        order = 2 * (int(first) + sum(other < key for other in keys[first:last]))
        extras.append(Extra(entry["file"], name, label, order, place))
    return extras


@dataclass(frozen=True)
class Plan:
    """For each split, the items of its shards: `cuts` [shards + 1] into `items` [n], a shuffle of samples and extras.

    Item i < len(split) is a sample of the source, the others are `extras[i - len(split)]`.
    """

    items: dict[str, np.ndarray]
    cuts: dict[str, np.ndarray]
    extras: dict[str, list[Extra]]
    twins: dict[str, frozenset[int]]  # items whose key another item has, too: a.jpg and a.png
    size: int  # bytes of all shards, estimated

    def shards(self) -> Iterator[tuple[str, int]]:
        return ((split, number) for split, cuts in self.cuts.items() for number in range(len(cuts) - 1))

    def of_shard(self, split: str, number: int) -> np.ndarray:
        return self.items[split][self.cuts[split][number] : self.cuts[split][number + 1]]


def read_checked(index: Index, split: str, sample: int) -> bytes:
    """A sample's bytes; UserError where they are not those that were indexed."""
    of_split = index.splits[split]
    remedy = "run pipeline verify on the source first"
    try:
        try:
            data = of_split.read(sample)
        except FileNotFoundError:
            if not appears(of_split.path(sample)):
                raise
            data = of_split.read(sample)
    except OSError as error:
        if error.errno in PASSING:
            raise explain_read(error, of_split.path(sample)) from error
        raise UserError(f"image {of_split.name(sample)} can't be read ({error.strerror}); {remedy}") from error
    if xxhash.xxh3_64_intdigest(data) != int(of_split.records["digest"][sample]):
        raise UserError(f"image {of_split.name(sample)} has changed since it was indexed; {remedy}")
    return data


Read = Callable[[Index, str, int], bytes]  #: gives a sample's bytes: of an index, a split and a sample's number


def make_key(synset: str, name: str, is_twin: bool = False) -> str:
    """Key of an image: its class and its path below the class folder without suffix.

    A dot in the file's stem would end the key, so it becomes a dash; where that, or the lost suffix, makes two keys the
    same (`is_twin`), a digest of the name is added.
    """
    parts = name.split("/")
    inner = "/".join(parts[parts.index(synset) + 1 :]) if synset in parts[:-1] else parts[-1]
    folder, slash, file = inner.rpartition("/")
    stem = file.rpartition(".")[0]
    tag = f"-{xxhash.xxh32_hexdigest(name.encode())}" if is_twin else ""
    return f"{synset}/{folder}{slash}{stem.replace('.', '-')}{tag}"


def _find_twins(index: Index, split: str, extras: list[Extra]) -> frozenset[int]:
    of_split = index.splits[split]
    if index.is_packed and of_split.shards:  # its names are keys already
        return frozenset()
    hashes = np.zeros(len(of_split) + len(extras), np.uint64)
    labels = of_split.records["label"].tolist()
    for i, (name, label) in enumerate(zip(of_split.iter_names(), labels, strict=True)):
        hashes[i] = xxhash.xxh3_64_intdigest(make_key(index.synsets[label], name).encode())
    for i, extra in enumerate(extras, len(of_split)):
        hashes[i] = xxhash.xxh3_64_intdigest(make_key(index.synsets[extra.label], extra.name).encode())
    _, back, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return frozenset(np.flatnonzero(counts[back] > 1).tolist())


def _mean_bytes(index: Index, split: str, options: Options, read: Read) -> float:
    """Bytes that a sample takes in a shard: known for originals, else learned from some."""
    of_split, side = index.splits[split], options.side_of(split)
    mean = float(of_split.records["size"].mean())
    if side is not None:
        probes = np.unique(np.linspace(0, len(of_split) - 1, PROBES).astype(int))
        before = after = 0
        for i in probes.tolist():
            data = read(index, split, i)
            record = of_split.records[i]
            before += len(data)
            shrinks = min(record["width"], record["height"]) > side
            after += len(reencode(data, side, options.quality)[0]) if shrinks else len(data)
        mean *= after / before
    return mean + SAMPLE_OVERHEAD


def make_plan(index: Index, options: Options, unreadable: dict[str, list[dict]], read: Read = read_checked) -> Plan:
    """Deal the samples out to shards of about `options.shard_mb`: a function of index and options alone.

    read: gives a sample's bytes, as `read_checked` does.
    """
    items, cuts, extras, twins, size = {}, {}, {}, {}, 0.0
    for number, split in enumerate(sorted(index.splits)):
        extras[split] = list_extras(index, split, unreadable.get(split, [])) if options.unreadable == "reencode" else []
        twins[split] = _find_twins(index, split, extras[split])
        count = len(index.splits[split]) + len(extras[split])
        mean = _mean_bytes(index, split, options, read)
        shards = max(1, round(count * mean / (options.shard_mb * 1e6)))
        items[split] = np.random.default_rng([options.seed, number]).permutation(count)
        cuts[split] = np.linspace(0, count, min(shards, count) + 1).astype(np.int64)
        size += count * mean * (RESTART_GROWTH if options.restart is not None else 1)
    return Plan(items, cuts, extras, twins, int(size))
