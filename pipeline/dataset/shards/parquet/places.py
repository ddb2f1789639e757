"""Where each row of parquet files goes: its shard, and its place in it."""

from dataclasses import dataclass
from pathlib import Path

import xxhash

from pipeline.dataset.index.index import Index
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.shards.format import BLOCK, image_suffix, tar_header, temporary_path
from pipeline.dataset.shards.in_place import sample_members
from pipeline.dataset.shards.pack import make_task
from pipeline.dataset.shards.plan import Options, Plan, make_key
from pipeline.dataset.shards.write_shard import Task
from pipeline.errors import UserError


@dataclass(frozen=True)
class Place:
    """Where a row's sample goes, and what it is. source: file, relative to the root, and row; shard: its number; start:
    byte there; header: bytes of the image's tar header; order: as of `Sample`."""

    source: tuple[str, int]
    shard: int
    start: int
    header: int
    key: str
    name: str
    label: int
    digest: int
    size: int
    shape: tuple[int, int]
    order: int


@dataclass(frozen=True)
class Shard:
    """A shard to be made. size: bytes of its members, as they are in the source; task: how to make it from those; None
    where it keeps them."""

    dest: Path
    split: str
    number: int
    places: tuple[Place, ...]
    size: int
    task: Task | None

    @property
    def temporary(self) -> Path:
        return temporary_path(self.dest, self.split, self.number)


def deal(dest: Path, index: Index, plan: Plan, options: Options, todo: list[tuple[str, int]]) -> list[Shard]:
    """The shards that are to be made."""
    unreadable = read_unreadable(index.folder)
    digests = {(entry["tar"], entry["offset"]): entry["digest"] for of in unreadable.values() for entry in of}
    shards = []
    for split, number in todo:
        of_split, end, places = index.splits[split], 0, []
        anew = options.side_of(split) is not None or options.restart is not None
        for item in plan.of_shard(split, number).tolist():
            if item < len(of_split):
                record, name, order = of_split.records[item], of_split.name(item), 2 * item + 1
                source = of_split.shards[record["shard"]], int(record["offset"])
                label, size, digest = int(record["label"]), int(record["size"]), int(record["digest"])
                shape = int(record["width"]), int(record["height"])
            else:
                extra, anew = plan.extras[split][item - len(of_split)], True
                assert extra.place is not None
                name, label, order, shape = extra.name, extra.label, extra.order, (0, 0)
                source, size = extra.place[:2], extra.place[2]
                digest = digests[source]
            key = make_key(index.synsets[label], name, item in plan.twins[split])
            header = len(tar_header(f"{key}.jpg", size))
            places.append(Place(source, number, end, header, key, name, label, digest, size, shape, order))
            text = len(tar_header(f"{key}.cls", len(str(label)))) + BLOCK
            end += header + size + -size % BLOCK + text
        task = make_task(dest, index, plan, options, split, number) if anew else None
        shards.append(Shard(dest, split, number, tuple(places), end, task))
    return shards


def members_of(place: Place, data: bytes) -> bytes:
    """A sample as it stands in its shard."""
    suffix = image_suffix(data, place.name)
    if len(tar_header(f"{place.key}.{suffix}", len(data))) != place.header:
        file, row = place.source
        raise UserError(
            f"row {row:,} of {file} has too long an image name for a tar header ({place.name}); write that file again "
            "with a shorter path in this row"
        )
    return sample_members(place.key, suffix, data, place.label)


def find_written(shard: Shard) -> list[bool]:
    """Which samples of an unfinished shard are in their places, as a killed run left it."""
    if not shard.temporary.exists():
        return [False] * len(shard.places)
    found = []
    with shard.temporary.open("rb") as file:
        for place in shard.places:
            file.seek(place.start + place.header)
            data = file.read(place.size)
            same = not place.size or xxhash.xxh3_64_intdigest(data) == place.digest
            whole = members_of(place, data) if same else b""
            file.seek(place.start)
            found.append(same and file.read(len(whole)) == whole)
    return found
