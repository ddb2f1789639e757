"""The tree that members are written into: each file complete or absent; and which exist already."""

import errno
import functools
import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipeline.dataset import imagenet
from pipeline.dataset.acquire.selection import BASE, final_name
from pipeline.dataset.acquire.zip_directory import Directory
from pipeline.dataset.disk import check_space, explain
from pipeline.progress import Progress

READERS = 8  # files whose CRC-32 is checked at a time
STATE = ".fetch"  #: folder below the root: journal, lock, files in the making


_writers = itertools.count()  # a stream that a stopped run left behind must not share a file with a new one


def check_tree_space(root: Path, needed: float) -> None:
    """`check_space` for `needed` bytes, less those of the images that an earlier run has written."""
    if needed > shutil.disk_usage(root).free and (root / BASE).is_dir():  # only then: it walks a million files
        needed -= sum(path.stat().st_size for path in (root / BASE).rglob("*.JPEG"))
    check_space(root, max(0, needed))


class TreeWriter:
    """Writes members as files below `root`. One writer serves several streams; each needs its own `stream` number."""

    def __init__(self, root: Path):
        self.root = root
        self.parts = root / STATE / "parts" / str(next(_writers))
        self.parts.mkdir(parents=True, exist_ok=True)
        self._folders: set[str] = set()
        self.prefix = f"{root}/"

    def write(self, stream: int, _number: int, name: str, chunks: Iterable[bytes]) -> int:
        """Write a member, all or nothing; what `chunks` raises leaves no file. Returns its bytes."""
        final = self.prefix + final_name(name)
        part = f"{self.parts}/{stream}"
        size = 0
        try:
            with open(part, "wb") as file:  # noqa: PTH123 - a million times: Path costs as much as the write
                for chunk in chunks:
                    size += file.write(chunk)
            folder = final.rpartition("/")[0]
            if folder not in self._folders:
                Path(folder).mkdir(parents=True, exist_ok=True)
                self._folders.add(folder)
            self._place(part, final)
        except OSError as error:
            raise explain(error, final) from error
        return size

    def _place(self, part: str, final: str) -> None:
        """Give a file its name; where a link has led to another disk, by way of a copy there."""
        try:
            os.replace(part, final)  # noqa: PTH105
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            folder, _, name = final.rpartition("/")
            beside = f"{folder}/.{name}.{os.getpid()}-{part.rpartition('/')[2]}.part"
            try:
                shutil.copyfile(part, beside)
                with open(beside, "rb") as file:  # noqa: PTH123
                    os.fsync(file.fileno())  # the journal's flush is of the disk of ROOT
                os.replace(beside, final)  # noqa: PTH105
            finally:
                Path(beside).unlink(missing_ok=True)


class ExistingFiles:
    """Sizes of the files below `root`, folder by folder; validation images count wherever valprep has put them."""

    def __init__(self, root: Path):
        self.root = root
        self._sizes = functools.lru_cache(64)(self._scan)
        self._val: dict[str, tuple[str, int]] | None = None

    def _scan(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(self.root / folder) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _scan_val(self) -> dict[str, tuple[str, int]]:
        base = f"{BASE}/val"
        folder = self.root / base
        folders = (
            [base, *(f"{base}/{path.name}" for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
        )
        return {name: (f"{place}/{name}", size) for place in folders for name, size in self._scan(place).items()}

    def find(self, name: str) -> tuple[str, int] | None:
        """(path relative to the root, bytes) of a member's file; None where there is none."""
        name = final_name(name)
        folder, _, file = name.rpartition("/")
        if folder == f"{BASE}/val":
            if self._val is None:
                self._val = self._scan_val()
            return self._val.get(file)
        size = self._sizes(folder).get(file)
        return None if size is None else (name, size)


def file_crc(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def find_whole(
    root: Path, directory: Directory, numbers: np.ndarray, trusted: np.ndarray, on_found: Callable[[int], None]
) -> np.ndarray:
    """Which of the members `numbers` [n] are complete in the tree: bool [n].

    A file of the right size counts where the journal vouches for it (`trusted`), else where its CRC-32 agrees; such
    members are passed to `on_found`.
    """
    whole = np.zeros(len(numbers), bool)
    if not (root / imagenet.CLS_LOC).is_dir() and not any(root.glob("LOC_*")):
        return whole
    present, vouched = ExistingFiles(root), np.isin(numbers, trusted)
    sizes, crcs = directory.entries["size"], directory.entries["crc"]
    unknown: list[tuple[int, str]] = []
    for i, number in enumerate(numbers.tolist()):
        found = present.find(directory.name(number))
        if found is not None and found[1] == sizes[number]:
            if vouched[i]:
                whole[i] = True
            else:
                unknown.append((i, found[0]))
    total = int(sizes[numbers[[i for i, _ in unknown]]].sum()) if unknown else 0
    with (
        ThreadPoolExecutor(READERS) as pool,
        Progress("Checking existing files", total, "bytes", quiet=not unknown) as progress,
    ):
        for first in range(0, len(unknown), 1 << 12):
            part = unknown[first : first + (1 << 12)]
            for (i, _), crc in zip(part, pool.map(file_crc, (root / path for _, path in part)), strict=True):
                number = int(numbers[i])
                if crc == crcs[number]:
                    whole[i] = True
                    on_found(number)
                progress.advance(int(sizes[number]))
    return whole
