"""Scan a tree in class folders into an index: every image decoded once in full, with all cores.

Only a full decode finds every truncated or corrupt image; what can't be decoded is listed and left out.
"""

import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import xxhash

from pipeline.command import run_command
from pipeline.dataset import imagenet
from pipeline.dataset.index import (
    RECORD,
    Index,
    image_suffixes,
    index_folder,
    is_current,
    open_index,
    write_index,
)
from pipeline.errors import UserError
from pipeline.progress import Progress

UNREADABLE = "unreadable.json"
CHUNK = 64  # files a task


@dataclass(frozen=True)
class Found:
    """A file that the listing found: path relative to the root, and its class."""

    name: str
    synset: str


@dataclass(frozen=True)
class Listing:
    """What a walk over one split found. `folders`: relative to the root -> mtime_ns."""

    files: list[Found]
    folders: dict[str, int]


def decode_fully(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an image whose every byte decodes; raises OSError or ValueError otherwise."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning)  # corrupt EXIF is no fault of the pixels
        try:
            with Image.open(BytesIO(data)) as image:
                image.load()
                return image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning, SyntaxError, EOFError) as error:
            raise ValueError(str(error)) from error


def inspect(path: str) -> tuple:
    """(size, mtime_ns, digest, width, height, None) of a readable image, or (0, 0, 0, 0, 0, reason)."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - one call a file, 1.28 M times
            stat = os.fstat(file.fileno())
            data = file.read()
        width, height = decode_fully(data)
    except Exception as error:  # a decoder may raise anything on hostile bytes
        return 0, 0, 0, 0, 0, f"{type(error).__name__}: {error}"
    return len(data), stat.st_mtime_ns, xxhash.xxh3_64_intdigest(data), width, height, None


def _inspect_all(paths: list[str]) -> list[tuple]:
    return [inspect(path) for path in paths]


def _walk(folder: Path, root: Path, folders: dict[str, int]) -> Iterator[str]:
    """Names, relative to `root`, of the images under `folder`; notes each folder's mtime."""
    for current, subfolders, files in os.walk(folder, followlinks=True):
        subfolders.sort()
        folders[os.path.relpath(current, root)] = os.stat(current).st_mtime_ns
        for file in sorted(files):
            if Path(file).suffix.lower() in image_suffixes():
                yield os.path.relpath(os.path.join(current, file), root)


def list_split(folder: Path, root: Path) -> Listing:
    """The images of one split, in class folders, or flat with a `LOC_val_solution.csv` in `root`.

    Raises UserError where there are no class folders, an empty one, or a flat image without a label.
    """
    folders = {os.path.relpath(folder, root): folder.stat().st_mtime_ns}
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    files: list[Found] = []
    for synset in classes:
        before = len(files)
        files += (Found(name, synset) for name in _walk(folder / synset, root, folders))
        if len(files) == before:
            raise UserError(f"class folder {folder / synset} holds no image; fill it or remove it")
    if not classes:
        names = list(_walk(folder, root, folders))
        solution = root / imagenet.VAL_SOLUTION
        if not names or not solution.is_file():
            raise UserError(f"{folder} holds no class folders; expected {folder}/CLASS/IMAGE")
        labels = imagenet.read_val_solution(solution)
        for name in names:
            synset = labels.get(Path(name).stem)
            if synset is None:
                raise UserError(f"image {root / name} has no row in {solution}; remove it or fetch the CSV again")
            files.append(Found(name, synset))
        files.sort(key=lambda found: (found.synset, found.name))
    return Listing(files, folders)


def _known_records(index: Index | None, split: str) -> dict[str, np.void]:
    if index is None or split not in index.splits:
        return {}
    known = index.splits[split]
    return {known.name(i): known.records[i] for i in range(len(known))}


def scan_split(
    root: Path, split: str, listing: Listing, labels: dict[str, int], previous: Index | None, processes: int
) -> tuple[np.ndarray, list[str], list[dict]]:
    """Records [n], names and the unreadable files of one split; what `previous` knows unchanged is not read again."""
    known = _known_records(previous, split)
    records = np.zeros(len(listing.files), RECORD)
    todo = []
    for i, found in enumerate(listing.files):
        old = known.get(found.name)
        if old is not None:
            stat = (root / found.name).stat()
            if (stat.st_size, stat.st_mtime_ns) == (old["size"], old["mtime_ns"]):
                records[i] = old
                continue
        todo.append(i)
    unreadable = {}
    chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    with (
        Progress(f"Indexing {split}", len(todo), "images", quiet=not todo) as progress,
        ProcessPoolExecutor(max(1, min(processes, len(chunks))), mp_context=get_context("spawn")) as pool,
    ):
        paths = ([str(root / listing.files[i].name) for i in chunk] for chunk in chunks)
        for chunk, results in zip(chunks, pool.map(_inspect_all, paths), strict=True):
            for i, (size, mtime_ns, digest, width, height, reason) in zip(chunk, results, strict=True):
                if reason is not None:
                    unreadable[i] = {"file": listing.files[i].name, "reason": reason}
                record = records[i]
                record["size"], record["mtime_ns"], record["digest"] = size, mtime_ns, digest
                record["width"], record["height"], record["shard"] = width, height, -1
            progress.advance(len(chunk))
    records["label"] = [labels[found.synset] for found in listing.files]
    keep = [i for i in range(len(records)) if i not in unreadable]
    return records[keep], [listing.files[i].name for i in keep], list(unreadable.values())


def build_index(root: Path, folder: Path | None = None, processes: int | None = None) -> Index:
    """Scan `root` (see `imagenet.find_splits`) and write its index; an index that is still true is only opened.

    Args:
        root: data root.
        folder: where the index goes; default `ROOT/index`.
        processes: default: every core that this process may use.

    Raises UserError for a tree that is not in class folders, an empty class, or a folder that can't be written.
    """
    folder = folder or index_folder(root)
    previous = None
    if (folder / "index.json").exists():
        try:
            previous = open_index(folder)
        except UserError:
            previous = None  # damaged: build anew
        if previous is not None and (not previous.folders or is_current(previous)):
            return previous
    root = root.resolve()
    places = imagenet.find_splits(root)
    listings = {split: list_split(place, root) for split, place in places.items()}
    synsets = sorted({found.synset for found in listings["train"].files})
    if not synsets:
        raise UserError(f"{places['train']} holds no image; expected {places['train']}/CLASS/IMAGE")
    unknown = sorted({found.synset for found in listings["val"].files} - set(synsets))
    if unknown:
        raise UserError(f"{places['val']} has the class '{unknown[0]}' that {places['train']} has not; make them agree")
    labels = {synset: label for label, synset in enumerate(synsets)}
    processes = processes or len(os.sched_getaffinity(0))
    splits, bad = {}, {}
    for split, listing in listings.items():
        records, names, bad[split] = scan_split(root, split, listing, labels, previous, processes)
        missing = np.setdiff1d(np.arange(len(synsets)), records["label"])
        if split == "train" and len(missing):
            raise UserError(f"class '{synsets[missing[0]]}' has no readable image in {places[split]}; fetch it again")
        if not len(records):
            raise UserError(f"{places[split]} has no readable image; fetch it again")
        splits[split] = records, names
    words = imagenet.read_synset_words(root)
    folders = {name: mtime for listing in listings.values() for name, mtime in listing.folders.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNREADABLE).write_text(json.dumps(bad, indent=1))
    except OSError as error:
        raise UserError(
            f"can't write the index into {folder} ({error.strerror}); choose another folder with --data.index DIR"
        ) from error
    return write_index(folder, root, [(s, words.get(s, s)) for s in synsets], splits, folders=folders)


def index(root: str, out: str | None = None, processes: int | None = None) -> int:
    """Scan a tree in class folders once, decode every image in full, and write its index.

    Args:
        root: an ILSVRC root, or a folder with train/ and val/ (or test/), each with a folder a class.
        out: folder of the index; default ROOT/index.
        processes: number of processes; default: all cores.
    """
    made = build_index(Path(root), Path(out) if out else None, processes)
    report = made.folder / UNREADABLE
    bad = json.loads(report.read_text()) if report.exists() else {}
    counts = ", ".join(f"{len(split):,} {name}" for name, split in made.splits.items())
    print(f"{made.folder}: {counts} images of {made.num_classes} classes, fingerprint {made.fingerprint}")
    number = sum(map(len, bad.values()))
    if number:
        print(f"{number} unreadable files are left out: see {report}")
    return 0


def main(argv: list[str]) -> int:
    return run_command(index, "index", argv)
