"""Scan a tree in class folders, or tar files, into an index: every image is decoded once in full, on all cores.

Only a full decode finds every truncated or corrupt image; images that can't be decoded are listed and left out. A
killed scan resumes where it stopped; a later one reads only files that have changed.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.command import run_command
from pipeline.counts import count
from pipeline.dataset.disk import explain
from pipeline.dataset.index.index import (
    PACKED,
    Index,
    check_sound,
    has_index,
    index_folder,
    is_current,
    open_index,
)
from pipeline.dataset.index.left_out import DEAD_LINKS, NO_PERMISSION, Tally, kind_of
from pipeline.dataset.index.listing import Listing, list_places
from pipeline.dataset.index.notes import UNREADABLE_FILE, left_out_lines, nested_lines, read_unreadable
from pipeline.dataset.index.scan_journal import PreviousScan, ScanJournal
from pipeline.dataset.index.scan_split import IN_TARS, Reader, scan_split
from pipeline.dataset.index.tar_listing import list_tars
from pipeline.dataset.index.write import write_index
from pipeline.dataset.layouts.find import Alone, Layout, find_layout
from pipeline.dataset.layouts.words import read_words
from pipeline.dataset.lock import locked
from pipeline.dataset.names import distinguish, twin_of
from pipeline.dataset.selected import MANIFEST, is_unfinished
from pipeline.dataset.workers import READERS
from pipeline.errors import UserError
from pipeline.files import atomic_write, reason_of
from pipeline.limits import available_cores

JOURNAL = "scan.journal"  #: results of an unfinished scan, one JSON array per line
LOCK = ".lock"
_STATS = 1024  # files a task of `_was_rewritten`


def open_previous(folder: Path, quiet: bool = False) -> Index | None:
    """The existing index; None where there is none or it is damaged (printed unless `quiet`). Raises UserError for that
    of packed shards whose records have changed: `index` can't make it again."""
    if not has_index(folder):
        return None
    opened = None
    try:
        opened = open_index(folder)
        check_sound(opened)
        return opened
    except UserError as error:
        if opened is not None and opened.is_packed:
            raise
        if not quiet:
            print(f"{str(error).split('; build')[0]}; rebuilding it", file=sys.stderr)
        return None


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Create `folder`, and wait while another process indexes into it."""
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, f"{folder}: another process is indexing; waiting for it"))
        except OSError as error:
            raise UserError(
                f"can't write the index into {folder} ({reason_of(error, folder)}); choose another folder with "
                "--data.index DIR (train, preflight), --index DIR (pack, verify, evaluate, report, bench, stage) or "
                "--out DIR (index)"
            ) from error
        yield


def _is_still_unreadable(root: Path, entry: dict) -> bool:
    """Is a file that a scan left out as it was then? What happens to a file itself does not touch its folder."""
    path = root / entry["file"]
    if kind_of(entry["reason"]) in (NO_PERMISSION, DEAD_LINKS):
        return not os.access(path, os.R_OK)
    try:
        stat = path.stat()
    except OSError:
        return True
    return "size" not in entry or (stat.st_size, stat.st_mtime_ns) == (entry["size"], entry["mtime_ns"])


def _was_rewritten(index: Index) -> bool:
    """Has an image in a file of its own another size or time than when it was indexed?"""
    with ThreadPoolExecutor(READERS) as pool:
        for split in index.splits.values():
            names = [] if split.shards else list(split.iter_names())
            wanted = list(zip(*(split.records[key].tolist() for key in ("size", "mtime_ns")), strict=True))

            def differs(first: int, names: list[str] = names, wanted: list[tuple] = wanted) -> bool:
                here = slice(first, first + _STATS)
                stats = (os.stat(f"{index.root}/{name}") for name in names[here])
                return [(stat.st_size, stat.st_mtime_ns) for stat in stats] != wanted[here]

            try:
                if any(pool.map(differs, range(0, len(names), _STATS))):
                    return True
            except OSError:
                return True
    return False


def build_index(
    root: Path,
    folder: Path | None = None,
    processes: int | None = None,
    alone: Alone | None = None,
    recheck: bool = False,
    by_fetch: bool = False,
) -> Index:
    """Scan `root` (see `layouts.find_layout`) and write its index; an index that is still valid is only opened.

    Args:
        root: data root.
        folder: where the index goes; default `ROOT/index`.
        processes: default: every core that this process may use.
        alone: this split alone is enough (see there); where the root is the validation split, the index goes beside
            it, to `ROOT.index`.
        recheck: also look at each file: whether one was rewritten, or one that it left out is fixed.
        by_fetch: a fetch has made the tree, and it is whole by now.

    Raises UserError for a tree that is not in class folders, an empty class, a fetch that was stopped, or a folder that
    can't be written.
    """
    known = (root / PACKED).exists() or has_index(index_folder(root))
    folder = folder or (index_folder(root) if known else _default_folder(root, alone))
    previous = open_previous(folder)
    if previous is not None and previous.is_packed:  # there is no tree to scan
        return previous
    if previous is None and (root / PACKED).exists():
        raise UserError(f"{root} holds packed shards without a sound index; run the same pack command again")
    layout = find_layout(root.resolve(), alone)
    root = layout.root
    if layout.note:
        print(layout.note, file=sys.stderr, flush=True)

    def is_valid(index: Index) -> bool:
        if index.root != root or not is_current(index, layout.places()) or (recheck and _was_rewritten(index)):
            return False
        entries = [entry for of_split in read_unreadable(folder).values() for entry in of_split] if recheck else []
        return all(_is_still_unreadable(root, entry) for entry in entries)

    if previous is not None and is_valid(previous):
        return previous
    if not by_fetch and is_unfinished(root):
        raise UserError(
            f"the fetch into {root} is not finished: run the same pipeline fetch again, or remove {root / MANIFEST} to "
            "take what is there as the data set"
        )
    with locked_folder(folder):
        previous = open_previous(folder, quiet=True)
        if previous is not None and is_valid(previous):  # by the process that was waited for
            return previous
        return _scan(layout, folder, previous, processes or available_cores())


def _default_folder(root: Path, alone: Alone | None) -> Path:
    """Where the index of a root without one goes: into it; but never into a split, where it would be a class."""
    layout = find_layout(root.resolve(), alone)
    if layout.folders == {"val": (root.resolve(),)}:
        return layout.root.with_name(f"{layout.root.name}.index")
    return index_folder(layout.root if root.resolve() in layout.places() else root)


def _scan(layout: Layout, folder: Path, previous: Index | None, processes: int) -> Index:
    root, of_folders = layout.root, layout.folders
    found = {split: list_places(place, root) for split, place in of_folders.items()}
    found |= list_tars(layout.tars, root, processes)
    listings = {split: found[split] for split in layout.splits}
    homes = {split: (*of_folders.get(split, ()), *_tar_files(layout, split))[0] for split in listings}
    return scan_listings(root, folder, listings, homes, previous, processes, read_words(root))


def scan_listings(
    root: Path,
    folder: Path,
    listings: dict[str, Listing],
    homes: dict[str, Path],
    previous: Index | None,
    processes: int,
    words: dict[str, str],
    reader: Reader = IN_TARS,
) -> Index:
    """Look at every image of the splits, and write the index.

    homes: where each split lies, for messages; words: class -> words; reader: as of `scan_split`.
    Raises UserError for a class of the validation split alone, and for a class or split without a readable image.
    """
    whole = next(iter(listings))  # the split that every class is in: train, or the only one
    classes = listings[whole].classes
    last = list(listings)[-1]  # val, or the only one
    unknown = sorted(set(listings[last].classes) - set(classes))
    if unknown:
        twin = twin_of(unknown[0], classes)
        remedy = "add or remove it" if twin is None else f"it is {distinguish(unknown[0], twin)}"
        raise UserError(f"{homes[last]} has the class '{unknown[0]}' that {homes[whole]} does not have; {remedy}")
    splits: dict[str, tuple[np.ndarray, Sequence[str]]] = {}
    bad, done = {}, False
    journal = None
    try:
        journal = ScanJournal(folder / JOURNAL)
        for split, listing in listings.items():
            known = PreviousScan(previous, split, journal)
            records, names, bad[split] = scan_split(root, split, listing, known, journal, processes, reader)
            if not len(records):
                raise UserError(f"{homes[split]} has no readable image ({bad[split][0]['reason']}); fetch it again")
            records["label"] = np.searchsorted(classes, listing.classes)[records["label"]]
            missing = np.setdiff1d(np.arange(len(classes)), records["label"])
            if split == whole and len(missing):
                of_class = [entry for entry in bad[split] if entry["class"] == classes[missing[0]]]
                raise UserError(
                    f"class '{classes[missing[0]]}' has no readable image in {homes[split]} ({of_class[0]['file']}: "
                    f"{of_class[0]['reason']}); put images that can be read there, or remove the class"
                )
            splits[split] = records, names
        noted = {name: mtime for listing in listings.values() for name, mtime in listing.mtimes.items()}
        atomic_write(folder / UNREADABLE_FILE, json.dumps(bad, indent=1))
        named = [(name, words.get(name, name)) for name in classes]
        left_out = {split: _tally(listing, bad[split]).reasons for split, listing in listings.items()}
        shards: dict[str, Sequence[str]]
        shards = {split: listing.places.shards for split, listing in listings.items() if listing.places is not None}
        made = write_index(folder, root, named, splits, shards, noted, left_out)
        done = True
        return made
    except OSError as error:
        raise explain(error, error.filename or folder) from error
    finally:
        if journal is not None:
            journal.close(remove=done)


def _tar_files(layout: Layout, split: str) -> tuple[Path, ...]:
    return layout.tars[split].files if split in layout.tars else ()


def _tally(listing: Listing, unreadable: list[dict]) -> Tally:
    """All that a split leaves out, by reason."""
    files = Tally()
    for entry in unreadable:
        files.add(kind_of(entry["reason"]), entry["file"])
    return files + listing.left_out


def index(root: str, out: str | None = None, processes: int | None = None) -> int:
    """Scan a data root once, decode every image in full, and write its index. Nothing is copied or unpacked.

    Args:
        root: an ILSVRC root; a folder with train/ and val/ (or test/), each with a folder a class; or a folder with
            WebDataset shards, or with the tar files of image-net.org.
        out: folder of the index; default ROOT/index.
        processes: number of processes; default: all cores.
    """
    made = build_index(Path(root), Path(out) if out else None, processes, recheck=True)
    counts = ", ".join(f"{len(split):,} {name}" for name, split in made.splits.items())
    print(f"{made.folder}: {counts} images of {count(made.num_classes, 'class')}, fingerprint {made.fingerprint}")
    for line in (*left_out_lines(made), *nested_lines(made)):
        print(line)
    return 0


def main(argv: list[str]) -> int:
    return run_command(index, "index", argv)
