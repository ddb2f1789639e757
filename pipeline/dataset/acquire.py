"""From an archive, wherever it lies, to a tree of whole images: what is missing is fetched, what is whole stays."""

import contextlib
import io
import os
import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.dataset import imagenet
from pipeline.dataset.catalog import (
    BOXES,
    LISTS,
    TAR,
    VAL,
    Catalog,
    check_listed,
    hash_name,
    iter_names,
    make_catalog,
    read_val_labels,
)
from pipeline.dataset.journal import Journal
from pipeline.dataset.remote import Patience
from pipeline.dataset.selection import SPLITS, Selection, final_name
from pipeline.dataset.tarball import TarUnpacker, ZipMemberStream, is_tar
from pipeline.dataset.transfer import Transfer, plan_requests
from pipeline.dataset.tree import STATE, Present, TreeWriter, find_whole
from pipeline.dataset.zip_directory import Directory, Source, check_safe, read_directory
from pipeline.errors import BrokenError, UserError

BLOCK = 4096  # bytes that a file's size is rounded up to, as most file systems do
UNPACKED = 1.06  # bytes of the images for each byte of the archive, and what the file system adds
NAMED = 3  # members named in an error


@dataclass(frozen=True)
class Options:
    """`streams`: parallel connections; `request_bytes`: most bytes asked for in one request."""

    streams: int = 8
    request_bytes: int = 32 << 20
    patience: Patience = field(default_factory=Patience)


@dataclass(frozen=True)
class Acquired:
    """What is whole in the tree now: the selection with its classes filled in, and the images of each split."""

    selection: Selection
    images: dict[str, int]


def check_space(folder: Path, needed: float, files: int = 0) -> None:
    """UserError with the figure where the disk of `folder` has less than `needed` bytes, or too few inodes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e9:,.3f} GB free, but {needed / 1e9:,.3f} GB are needed; "
            "free some space or give another folder"
        )
    stat = os.statvfs(folder)
    if stat.f_files and stat.f_favail < files:
        raise UserError(f"the disk of {folder} has room for {stat.f_favail:,} more files, but {files:,} are needed")


class Acquisition:
    """One run over one archive. The journal and half-written files lie in `ROOT/.fetch`."""

    def __init__(self, root: Path, source: Source, options: Options, stop: threading.Event):
        self.root, self.source, self.options, self.stop = root, source, options, stop

    def run(self, selection: Selection) -> Acquired:
        """Bring everything selected into the tree. Raises UserError or BrokenError, one line each."""
        if is_tar(self.source):
            check_space(self.root, self.source.size * UNPACKED)
            return self._unpack_tar(self.source.open(0, self.source.size), selection)
        catalog = make_catalog(self._open_directory())
        directory, lists = catalog.directory, _choose_lists(catalog, selection)
        images = np.concatenate(list(catalog.select(selection).values()))
        with contextlib.closing(Journal(self.root / STATE / "journal", directory.fingerprint)) as journal:
            asked = np.append(lists, images)
            whole = np.zeros(len(directory), bool)
            whole[asked] = find_whole(self.root, directory, asked, journal.trusted, journal.add)
            if selection.classes is None:
                self._check_space(directory, asked[~whole[asked]])
            self._fetch(directory, journal, lists[~whole[lists]], "Fetching lists")
            nested = catalog.numbers(TAR)
            if not len(nested) or catalog.synsets or len(catalog.numbers(VAL)):
                return self._fetch_images(catalog, journal, whole, selection)
        check_space(self.root, int(directory.entries["size"][nested[0]]) * UNPACKED)
        stream = ZipMemberStream(self.source, directory, int(nested[0]))
        return self._unpack_tar(io.BufferedReader(stream, 1 << 20), selection)

    def repair(self, names: list[str]) -> None:
        """Fetch members anew, whatever is in the tree. UserError for names that the archive does not have."""
        directory = self._open_directory()
        wanted = {final_name(name) for name in names}
        numbers = {}
        for number, name in enumerate(map(final_name, iter_names(directory))):
            if name in wanted:
                numbers[name] = number
        unknown = sorted(wanted - set(numbers))
        if unknown:
            raise UserError(f"{self.source.name} has no member {unknown[0]}; it can't be repaired from there")
        present = Present(self.root)
        for name in wanted:
            if found := present.find(name):
                (self.root / found[0]).unlink()
        with contextlib.closing(Journal(self.root / STATE / "journal", directory.fingerprint)) as journal:
            self._fetch(directory, journal, np.array(sorted(numbers.values()), np.int64), "Repairing")

    def _open_directory(self) -> Directory:
        directory = read_directory(self.source)
        check_safe(directory)
        return directory

    def _fetch_images(self, catalog: Catalog, journal: Journal, whole: np.ndarray, selection: Selection) -> Acquired:
        directory = catalog.directory
        synsets = catalog.synsets or imagenet.read_synset_words(self.root)
        selection = selection.resolve(synsets, read_val_labels(self.root))
        wanted = catalog.select(selection)
        if not any(map(len, wanted.values())):
            raise UserError(f"{self.source.name} has no image of what was asked for (split '{selection.split}')")
        held = {
            split: np.fromiter(map(hash_name, iter_names(directory, numbers)), np.uint64, len(numbers))
            for split, numbers in wanted.items()
        }
        check_listed(self.source.name, self.root, selection, held)
        numbers = np.concatenate([wanted[split] for split in SPLITS])
        here = int(whole[numbers].sum())
        if here:
            print(f"{here:,} of {len(numbers):,} images are here already", file=sys.stderr)
        self._check_space(directory, numbers[~whole[numbers]])
        self._fetch(directory, journal, numbers[~whole[numbers]], "Fetching images", numbers[whole[numbers]])
        return Acquired(selection, {split: len(wanted[split]) for split in SPLITS})

    def _check_space(self, directory: Directory, numbers: np.ndarray) -> None:
        sizes = directory.entries["size"][numbers].astype(np.int64)
        check_space(self.root, int(((sizes + BLOCK - 1) // BLOCK * BLOCK).sum()) * 1.005, len(sizes))

    def _fetch(self, directory: Directory, journal: Journal, missing: np.ndarray, title: str, whole=()) -> None:
        """Fetch the members `missing`; no request covers the members `whole`."""
        requests = plan_requests(directory, missing, np.asarray(whole, np.int64), self.options.request_bytes)
        transfer = Transfer(self.source, directory, TreeWriter(self.root), journal, self.stop)
        transfer.run(requests, self.options.streams, title)
        if transfer.damaged:
            some = ", ".join(f"{name} ({reason})" for name, reason in sorted(transfer.damaged)[:NAMED])
            raise BrokenError(
                f"{self.source.name}: {len(transfer.damaged)} of {len(missing):,} members arrive damaged: {some}; "
                "all others are whole, the same command tries these again"
            )

    def _unpack_tar(self, stream: io.BufferedReader, selection: Selection) -> Acquired:
        return Acquired(*TarUnpacker(self.root, self.source, selection).run(stream))


def _choose_lists(catalog: Catalog, selection: Selection) -> np.ndarray:
    """Members that tell labels and counts: the lists, and the validation boxes where the solution is missing."""
    lists = catalog.numbers(LISTS)
    if selection.has("val") and imagenet.VAL_SOLUTION not in iter_names(catalog.directory, lists):
        return np.append(lists, catalog.numbers(BOXES))
    return lists
