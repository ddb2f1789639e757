"""Which images a verification looks at: those of the index, and those that lie in the root and are not in the index."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from pipeline.dataset import imagenet
from pipeline.dataset.index.index import Index, Split, is_current
from pipeline.dataset.index.listing import Listing, list_places
from pipeline.dataset.index.notes import read_unreadable
from pipeline.dataset.index.tar_listing import list_tars
from pipeline.dataset.layouts.find import TRAIN_NAMES, VAL_NAMES, Layout, find_layout
from pipeline.dataset.names import dead_link
from pipeline.dataset.verify.check import Item, NamedSample, iter_samples, make_item, new_item
from pipeline.errors import UserError

Named = tuple[NamedSample, Item]  #: a sample, and where its bytes are


def find_splits(root: Path) -> Layout:
    """The layout of `root`; unlike for training, one split may be enough."""
    try:
        return find_layout(root)
    except UserError:
        base = root / imagenet.CLS_LOC if (root / imagenet.CLS_LOC).is_dir() else root
        folders: dict[str, tuple[Path, ...]] = {
            split: (base / split,) for split in ("train", "val") if (base / split).is_dir()
        }
        links = (dead_link(base / name) for name in (*TRAIN_NAMES, *VAL_NAMES))
        if not folders or any(links):
            raise
        return Layout(root, folders)


def name_samples(root: Path, index: Index | None, processes: int) -> tuple[int, Iterator[Named]]:
    """How many samples should be looked at, and each of them, named, with the `check.Item` that says where its bytes
    are.

    Those of the index; then images that it does not have: new ones, and those it left out as unreadable. processes:
    that walk tar files, where these are others than when they were indexed.
    """
    parts = list(_find_parts(root, index, processes))
    return sum(number for number, _ in parts), itertools.chain.from_iterable(samples for _, samples in parts)


def _find_parts(root: Path, index: Index | None, processes: int) -> Iterator[tuple[int, Iterator[Named]]]:
    """The samples, split by split, each part with its number."""
    layout = None if index is not None and index.is_packed else find_splits(root)
    if index is not None and (layout is None or is_current(index, layout.places())):
        for split, of_split in index.splits.items():
            yield len(of_split), _indexed(index, split)
        if layout is not None:
            unreadable = list(_unreadable(index))
            yield len(unreadable), iter(unreadable)
        return
    assert layout is not None
    listings = {split: list_places(places, layout.root, True) for split, places in layout.folders.items()}
    listings |= list_tars(layout.tars, layout.root, processes)
    for split, of_split in index.splits.items() if index is not None else ():
        if split not in listings and index is not None:
            yield len(of_split), _indexed(index, split)
    for split, listing in listings.items():
        of_index = None if index is None else index.splits.get(split)
        found = {} if of_index is None else _match(of_index, listing)
        lost = 0 if of_index is None else len(of_index) - len(found)
        yield len(listing.names) + lost, _listed(layout.root, split, listing, index, found)


def _match(of_split: Split, listing: Listing) -> dict[int, int]:
    """Samples of the index -> images of the listing: those of the same tar file and member, else of the same name.

    Where several tar files have a member of the same name, the tar's name stands in front of it (see `list_tars`):
    which names are so depends on which tar files are there.
    """
    shards = [of_split.shards[number] if number >= 0 else "" for number in of_split.records["shard"].tolist()]
    names = list(of_split.iter_names())
    places = listing.places
    here = [""] * len(listing.names) if places is None else [places.shards[i] for i in places.shard.tolist()]
    free = {
        (tar, name.removeprefix(f"{tar}/")): i for i, (tar, name) in enumerate(zip(here, listing.names, strict=True))
    }
    found = {}
    for sample, (tar, name) in enumerate(zip(shards, names, strict=True)):
        i = free.pop((tar, name.removeprefix(f"{tar}/")), None)
        if i is not None:
            found[sample] = i
    if len(found) < len(names):
        taken = set(found.values())
        by_name = {name: i for i, name in enumerate(listing.names) if i not in taken}
        for sample, name in enumerate(names):
            if sample not in found and name in by_name:
                found[sample] = by_name.pop(name)
    return found


def _unreadable(index: Index) -> Iterator[Named]:
    """The images that the index has left out."""
    for split, entries in read_unreadable(index.folder).items():
        for entry in entries:
            name, tar = entry["file"], entry.get("tar")
            item = new_item(index.root, name)
            if tar is not None:
                item = Item(f"{index.root}/{tar}", entry["offset"], entry["size"], None)
            yield _named(split, name, entry["class"], name.removeprefix(f"{tar}:")), item


def _named(split: str, name: str, synset: str, inner: str) -> NamedSample:
    """inner: the name without that of a tar file."""
    return NamedSample(split, name, synset, inner.rpartition("/")[2].rpartition(".")[0], "")


def _indexed(index: Index, split: str) -> Iterator[Named]:
    return (_of_index(index, split, i, name) for i, name in iter_samples(index.splits[split]))


def _of_index(index: Index, split: str, i: int, name: str) -> Named:
    of_split = index.splits[split]
    synset = index.synsets[of_split.records["label"][i]]
    return _named(split, name, synset, name), make_item(of_split, i, name, index.is_packed)


def _listed(root: Path, split: str, listing: Listing, index: Index | None, found: dict[int, int]) -> Iterator[Named]:
    """The images of a root that has changed since it was indexed. found: as of `_match`."""
    new = set(range(len(listing.names))) - set(found.values())
    if index is not None and split in index.splits:
        for sample, name in iter_samples(index.splits[split]):
            named, item = _of_index(index, split, sample, name)
            if listing.places is not None:
                i = found.get(sample)
                item = Item("", -1, 0, 0) if i is None else _member(root, listing, i)._replace(digest=item.digest)
            yield named, item
    for i in sorted(new):
        name = listing.names[i]
        item = new_item(root, name) if listing.places is None else _member(root, listing, i)
        yield _named(split, listing.describe(i), listing.classes[listing.labels[i]], name), item


def _member(root: Path, listing: Listing, i: int) -> Item:
    places = listing.places
    assert places is not None
    return Item(f"{root}/{places.shards[places.shard[i]]}", int(places.offset[i]), int(places.size[i]), None)
