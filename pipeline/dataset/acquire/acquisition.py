"""From an archive, local or remote, to a tree of images: missing ones are fetched, complete ones are kept."""

import contextlib
import io
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset import imagenet
from pipeline.dataset.acquire.access.backoff import Patience
from pipeline.dataset.acquire.catalog import (
    BOXES,
    LISTS,
    TAR,
    Catalog,
    check_listed,
    hash_name,
    iter_names,
    make_catalog,
    read_val_labels,
)
from pipeline.dataset.acquire.journal import Journal
from pipeline.dataset.acquire.selection import BASE, Selection, final_name
from pipeline.dataset.acquire.tarball import TarUnpacker, ZipMemberStream, is_tar
from pipeline.dataset.acquire.transfer import Transfer, Writer, plan_requests
from pipeline.dataset.acquire.tree import STATE, ExistingFiles, TreeWriter, check_tree_space, find_whole
from pipeline.dataset.acquire.zip_directory import ArchiveDamagedError, Directory, Source, check_safe, read_directory
from pipeline.dataset.disk import BLOCK, check_space
from pipeline.dataset.shards.plan import Options as PackOptions
from pipeline.errors import UserError

UNPACKED = 1.06  # bytes of the images for each byte of the archive, and what the file system adds
NAMED = 3  # members named in an error


@dataclass(frozen=True)
class Options:
    """`streams`: parallel connections; `request_bytes`: most bytes asked for in one request."""

    streams: int = 8
    request_bytes: int = 32 << 20
    patience: Patience = field(default_factory=Patience)


class Acquisition:
    """One run over one archive. The journals and half-written files lie in `ROOT/.fetch`.

    `resolved` is called with the selection, its classes filled in, before the first image is fetched.
    """

    def __init__(
        self,
        root: Path,
        source: Source,
        options: Options,
        stop: threading.Event,
        resolved: Callable[[Selection], None] = lambda selection: None,
    ):
        self.root, self.source, self.options, self.stop, self.resolved = root, source, options, stop, resolved

    def run(self, selection: Selection, pack: PackOptions | None = None) -> dict[str, int]:
        """Fetch the selection into the tree, or with `pack` into shards; the number of images of each split.

        Raises UserError or TransientError, one line each.
        """
        if is_tar(self.source):
            return self._unpack_tar(self.source.open(0, self.source.size), self.source.size, selection, pack)
        catalog = make_catalog(self._open_directory())
        directory, lists = catalog.directory, _choose_lists(catalog, selection)
        with self._journal("journal", directory.fingerprint) as journal:
            whole = np.zeros(len(directory), bool)
            images = np.concatenate(list(catalog.select(selection).values()))
            asked = np.append(lists, images)
            looked_for = asked if pack is None else lists
            whole[looked_for] = find_whole(self.root, directory, looked_for, journal.trusted, journal.add)
            if selection.classes is None and pack is None:  # shards have an estimate of their own
                self._check_space(directory, asked[~whole[asked]])
            self._fetch(directory, journal, TreeWriter(self.root), lists[~whole[lists]], "Fetching lists")
            if len(images):
                selection, wanted = self._resolve(catalog, selection)
                if pack is None:
                    self._fetch_images(directory, journal, wanted, whole)
        if not len(images):
            inner = int(catalog.numbers(TAR)[0])
            stream = io.BufferedReader(ZipMemberStream(self.source, directory, inner), 1 << 20)
            return self._unpack_tar(stream, int(directory.entries["size"][inner]), selection, pack)
        if pack is not None:
            self._pack(catalog, selection, wanted, pack)
        return {split: len(numbers) for split, numbers in wanted.items()}

    def repair(self, names: list[str], selection: Selection) -> None:
        """Fetch members again, whatever is in the tree. UserError for names that the archive does not have.

        `selection`: what the tree is to hold; a tar can't be entered in the middle and is read for all of it.
        """
        wanted = {final_name(name) for name in names}
        directory = None if is_tar(self.source) else self._open_directory()
        held = {}
        if directory is not None:
            for number, name in enumerate(iter_names(directory)):
                if name.startswith(f"{BASE}/"):
                    held[final_name(name)] = number
        if held:
            _refuse_unknown(self.source, wanted - set(held))
        present = ExistingFiles(self.root)
        for name in wanted:
            if found := present.find(name):
                (self.root / found[0]).unlink()
        if directory is None or not held:
            self.run(selection)
            present = ExistingFiles(self.root)
            _refuse_unknown(self.source, {name for name in wanted if present.find(name) is None})
            return
        with self._journal("journal", directory.fingerprint) as journal:
            numbers = np.array(sorted(held[name] for name in wanted), np.int64)
            self._fetch(directory, journal, TreeWriter(self.root), numbers, "Repairing")

    def _open_directory(self) -> Directory:
        directory = read_directory(self.source)
        check_safe(directory)
        return directory

    def _journal(self, name: str, fingerprint: int) -> contextlib.closing:
        return contextlib.closing(Journal(self.root / STATE / name, fingerprint))

    def _resolve(self, catalog: Catalog, selection: Selection) -> tuple[Selection, dict[str, np.ndarray]]:
        """The selection with its classes filled in, and the member numbers of its images. The lists are here by now."""
        directory = catalog.directory
        synsets = catalog.synsets or imagenet.read_synset_words(self.root)
        selection = selection.resolve(synsets, read_val_labels(self.root))
        wanted = catalog.select(selection)
        if not any(map(len, wanted.values())):
            raise UserError(f"{self.source.name} has no image of the selection (split '{selection.split}')")
        held = {
            split: np.fromiter(map(hash_name, iter_names(directory, numbers)), np.uint64, len(numbers))
            for split, numbers in wanted.items()
        }
        check_listed(self.source.name, self.root, selection, held)
        self.resolved(selection)
        return selection, wanted

    def _fetch_images(self, directory: Directory, journal: Journal, wanted: dict, whole: np.ndarray) -> None:
        numbers = np.concatenate(list(wanted.values()))
        here, missing = numbers[whole[numbers]], numbers[~whole[numbers]]
        if len(here):
            print(f"{len(here):,} of {len(numbers):,} images exist already", file=sys.stderr)
        self._check_space(directory, missing)
        self._fetch(directory, journal, TreeWriter(self.root), missing, "Fetching images", here)

    def _pack(self, catalog: Catalog, selection: Selection, wanted: dict, options: PackOptions) -> None:
        from pipeline.dataset.acquire.fetch_pack import Packing, ShardPatcher, ShardPlan

        plan = ShardPlan(catalog, selection, wanted, options)
        packing = Packing(self.root, plan)
        packing.prepare()
        with self._journal("journal-pack", plan.fingerprint) as journal:
            whole = packing.find_whole(journal.trusted)
            if whole.any():
                print(f"{whole.sum():,} of {len(whole):,} images exist already", file=sys.stderr)
            check_space(self.root, packing.needed(whole), len(plan.shards))
            here, missing = plan.numbers[whole], plan.numbers[~whole]
            self._fetch(catalog.directory, journal, ShardPatcher(self.root, plan), missing, "Fetching images", here)
        packing.finish()

    def _check_space(self, directory: Directory, numbers: np.ndarray) -> None:
        sizes = directory.entries["size"][numbers].astype(np.int64)
        check_space(self.root, int(((sizes + BLOCK - 1) // BLOCK * BLOCK).sum()) * 1.005, len(sizes))

    def _fetch(
        self, directory: Directory, journal: Journal, writer: Writer, missing: np.ndarray, title: str, here: Any = ()
    ) -> None:
        """Fetch the members `missing`; no request covers the members `here`."""
        requests = plan_requests(directory, missing, np.asarray(here, np.int64), self.options.request_bytes)
        transfer = Transfer(self.source, directory, writer, journal, self.stop)
        transfer.run(requests, self.options.streams, title)
        if transfer.damaged:
            some = ", ".join(f"{name} ({reason})" for name, reason in sorted(transfer.damaged)[:NAMED])
            raise ArchiveDamagedError(
                f"{self.source.name}: {len(transfer.damaged)} of {len(missing):,} members arrive damaged: {some}; "
                "all others are complete; run the same command again to fetch these"
            )

    def _unpack_tar(self, stream: Any, size: int, selection: Selection, pack: PackOptions | None) -> dict[str, int]:
        if pack is not None:
            raise UserError(
                f"{self.source.name} holds its images in a tar, which --pack can't read by member; "
                "fetch without --pack, then run: pipeline pack"
            )
        check_tree_space(self.root, unpacked_bytes(size, selection))
        return TarUnpacker(self.root, self.source, selection, self.resolved).run(stream)


def unpacked_bytes(size: int, selection: Selection) -> float:
    """Most bytes of the images in an archive of `size` bytes whose members are not known yet; 0 for a small part."""
    return size * UNPACKED if selection.has("train") and selection.classes is None else 0


def _refuse_unknown(source: Source, names: set[str]) -> None:
    for name in sorted(names)[:1]:
        raise UserError(f"{source.name} has no member {name}; it can't be repaired from there")


def _choose_lists(catalog: Catalog, selection: Selection) -> np.ndarray:
    """Members that hold labels and counts: the lists, and the validation boxes where the solution is missing."""
    lists = catalog.numbers(LISTS)
    if selection.has("val") and imagenet.VAL_SOLUTION not in iter_names(catalog.directory, lists):
        return np.append(lists, catalog.numbers(BOXES))
    return lists
