"""The older archive: everything in one tar.gz, alone or inside the zip. Read once from its first byte to its last.

A tar.gz has no directory and can't be entered in the middle: a second run reads it again from the start, and writes
only what is missing.
"""

import gzip
import io
import tarfile
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from pipeline.dataset import imagenet
from pipeline.dataset.acquire.catalog import check_listed, hash_name, read_val_labels
from pipeline.dataset.acquire.journal import Journal
from pipeline.dataset.acquire.selection import LIST, SPLITS, VAL_BOX, Selection
from pipeline.dataset.acquire.transfer import BARRIER_EVERY_S, CHUNK, MemberDamagedError, Reader, unpack
from pipeline.dataset.acquire.tree import STATE, ExistingFiles, TreeWriter
from pipeline.dataset.acquire.zip_directory import ArchiveDamagedError, Directory, Source, check_name
from pipeline.errors import UserError
from pipeline.progress import Progress

MAX_IMAGE = 1 << 28  # bytes; the largest of the real ones has 16 MB
EDGE = 1 << 16


def is_tar(source: Source) -> bool:
    """Does an archive begin like a tar or a tar.gz?"""
    with source.open(0, min(512, source.size)) as stream:
        start = stream.read(512)
    return start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar"


class ZipMemberStream(io.RawIOBase):
    """The unpacked bytes of one member of a zip, its CRC-32 checked at the end."""

    def __init__(self, source: Source, directory: Directory, number: int):
        start, end = (int(directory.entries[key][number]) for key in ("start", "end"))
        self.file = source.open(start, end)
        self.chunks = unpack(Reader(self.file, start), directory, number)
        self.chunk = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.chunk:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.chunk = memoryview(chunk)
        count = min(len(buffer), len(self.chunk))
        buffer[:count] = self.chunk[:count]
        self.chunk = self.chunk[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class TarUnpacker:
    """Writes the selected members of a tar or tar.gz into the tree; complete files of an earlier run are kept."""

    def __init__(self, root: Path, source: Source, selection: Selection, resolved: Callable[[Selection], None]):
        self.root, self.source, self.selection, self.resolved = root, source, selection, resolved
        self.held = {split: array("Q") for split in SPLITS}
        self._resolved: Selection | None = None

    def run(self, stream: io.BufferedReader) -> dict[str, int]:
        """Unpack `stream` to its end; the number of images of each split.

        Raises ArchiveDamagedError where the archive is cut or damaged, UserError where it is hostile or only a part.
        """
        name = self.source.name
        journal = Journal(self.root / STATE / "journal-tar", self._fingerprint())
        packed = stream.peek(2)[:2] == b"\x1f\x8b"
        plain = io.BufferedReader(gzip.GzipFile(fileobj=stream), 1 << 20) if packed else stream
        try:
            self._unpack(plain, journal)
            while plain.read(1 << 20):  # to the end, where the checksums are
                pass
            journal.barrier()
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, MemberDamagedError) as error:
            raise ArchiveDamagedError(f"{name} is cut or damaged ({error}); fetch it again") from error
        finally:
            journal.close()
        selection = self._resolve()
        if not any(self.held.values()):
            raise UserError(f"{name} has no image of the selection (split '{selection.split}')")
        check_listed(name, self.root, selection, {split: np.array(held) for split, held in self.held.items()})
        return {split: len(held) for split, held in self.held.items()}

    def _fingerprint(self) -> int:
        digest = xxhash.xxh3_64(str(self.source.size).encode())
        for start in {0, max(0, self.source.size - EDGE)}:
            with self.source.open(start, min(start + EDGE, self.source.size)) as stream:
                digest.update(stream.read())
        return digest.intdigest()

    def _unpack(self, plain: BinaryIO, journal: Journal) -> None:
        present, writer, trusted = ExistingFiles(self.root), TreeWriter(self.root), set(journal.trusted.tolist())
        begin, barrier_at = self.source.received, time.monotonic() + BARRIER_EVERY_S
        with (
            tarfile.open(fileobj=plain, mode="r|", bufsize=1 << 20) as tar,
            Progress("Unpacking", self.source.size, "bytes") as progress,
        ):
            for number, info in enumerate(self._members(tar)):
                progress.advance(self.source.received - begin - progress.count)
                split = self._resolve().wants(info.name) if info.name.endswith(".JPEG") else None
                if not (split or LIST.fullmatch(info.name) or VAL_BOX.fullmatch(info.name)):
                    continue
                if info.size > MAX_IMAGE:
                    raise UserError(f"{self.source.name} holds {info.name!r} of {info.size:,} bytes: archive refused")
                found = present.find(info.name) if number in trusted else None
                if found is None or found[1] != info.size:
                    writer.write(0, number, info.name, read_member(tar, info))
                    journal.add(number)
                if split:
                    self.held[split].append(hash_name(info.name))
                if time.monotonic() > barrier_at:
                    journal.barrier()
                    barrier_at = time.monotonic() + BARRIER_EVERY_S

    def _members(self, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """Files of a tar, as they come; hostile ones are refused by name."""
        seen: set[int] = set()
        while (info := tar.next()) is not None:
            vars(tar)["members"].clear()  # it would keep a million of them
            info.name = info.name.removeprefix("./")
            if info.isdir() and info.name in ("", "."):
                continue
            check_name(self.source.name, info.name)
            if info.isdir():
                continue
            if not info.isreg():
                raise UserError(f"{self.source.name} holds {info.name!r}, a link or a special file: archive refused")
            folded = hash_name(info.name.casefold())
            if folded in seen:
                raise UserError(f"{self.source.name} holds {info.name!r} twice, or twice but for case: archive refused")
            seen.add(folded)
            yield info

    def _resolve(self) -> Selection:
        """Labels are read when the first image comes: the lists may have come with the archive by then."""
        if self._resolved is None:
            labels = read_val_labels(self.root)
            synsets = imagenet.read_synset_words(self.root) or set(labels.values())
            if self.selection.classes is not None and not synsets:
                raise UserError(
                    f"--classes: {self.source.name} does not list its classes before its images; fetch all, "
                    f"or put {imagenet.SYNSET_MAPPING} and {imagenet.VAL_SOLUTION} into {self.root}"
                )
            self._resolved = self.selection.resolve(synsets, labels)
            self.resolved(self._resolved)
        return self._resolved


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Iterator[bytes]:
    """The bytes of a member, in chunks. Raises EOFError if the archive ends before them."""
    file, left = tar.extractfile(info), info.size
    assert file is not None
    while left:
        chunk = file.read(min(CHUNK, left))
        if not chunk:
            raise EOFError(f"{info.name} ends early")
        left -= len(chunk)
        yield chunk
