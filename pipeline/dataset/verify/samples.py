"""Which images a verification looks at: those of the index, and those that lie in the root and are not in the index."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.dataset import imagenet
from pipeline.dataset.index.index import Index, is_current
from pipeline.dataset.index.listing import Listing, list_places
from pipeline.dataset.index.scan import read_unreadable
from pipeline.dataset.index.tar_listing import list_tars
from pipeline.dataset.layouts.find import TRAIN_NAMES, VAL_NAMES, Layout, find_layout
from pipeline.dataset.names import dead_link
from pipeline.dataset.verify.check import Item, NamedSample, iter_samples, make_item, new_item
from pipeline.errors import UserError


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


def name_samples(root: Path, index: Index | None, processes: int) -> Iterator[tuple[NamedSample, Item]]:
    """Every sample that should be looked at, named, and the `check.Item` that says where its bytes are.

    Those of the index; then images that it does not have: new ones, and those it left out as unreadable. processes:
    that walk tar files, where these are others than when they were indexed.
    """
    if index is not None and index.is_packed:
        for split in index.splits:
            yield from _indexed(index, split)
        return
    layout = find_splits(root)
    current = index is not None and is_current(index, layout.places())
    if index is not None and current:
        for split in index.splits:
            yield from _indexed(index, split)
        yield from _unreadable(index)
        return
    listings = {split: list_places(places, layout.root, True) for split, places in layout.folders.items()}
    listings |= list_tars(layout.tars, layout.root, processes)
    for split in index.splits if index is not None else ():
        if split not in listings and index is not None:
            yield from _indexed(index, split)
    for split, listing in listings.items():
        yield from _listed(layout.root, split, listing, index)


def _unreadable(index: Index) -> Iterator[tuple[NamedSample, Item]]:
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


def _indexed(index: Index, split: str) -> Iterator[tuple[NamedSample, Item]]:
    of_split = index.splits[split]
    for i, name in iter_samples(of_split):
        synset = index.synsets[of_split.records["label"][i]]
        yield _named(split, name, synset, name), make_item(of_split, i, name)


def _listed(root: Path, split: str, listing: Listing, index: Index | None) -> Iterator[tuple[NamedSample, Item]]:
    """The images of a root that has changed since it was indexed; those that the index has, by their names."""
    number = {name: i for i, name in enumerate(listing.names)}
    for named, item in _indexed(index, split) if index is not None and split in index.splits else ():
        i = number.pop(named.name, None)
        if listing.places is not None:
            item = Item("", -1, 0, 0) if i is None else _member(root, listing, i)._replace(digest=item.digest)
        yield named, item
    for name, i in number.items():
        item = new_item(root, name) if listing.places is None else _member(root, listing, i)
        yield _named(split, listing.describe(i), listing.classes[listing.labels[i]], name), item


def _member(root: Path, listing: Listing, i: int) -> Item:
    places = listing.places
    assert places is not None
    return Item(f"{root}/{places.shards[places.shard[i]]}", int(places.offset[i]), int(places.size[i]), None)
