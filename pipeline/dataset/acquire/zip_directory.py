"""The central directory of a zip, as arrays: 2 million members in some 300 MB, on a local file or over HTTP ranges.

`zipfile` reads the same bytes, yet makes an object of each member (1.3 GB for ImageNet's archive), so only the
parsing is done here. What could harm (names that leave the folder, links, bombs) is refused here, by name.
"""

import re
import stat
import struct
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np
import xxhash

from pipeline.errors import TransientError, UserError
from pipeline.progress import Progress

ENTRY = np.dtype(
    [
        ("start", "<u8"),  # of the local header, from the archive's first byte
        ("end", "<u8"),  # where the next member, or the directory, begins
        ("packed", "<u8"),  # bytes in the archive
        ("size", "<u8"),  # bytes once unpacked
        ("crc", "<u4"),
        ("name_offset", "<u8"),  # into the directory's bytes
        ("name_length", "<u2"),
        ("flags", "<u2"),
        ("method", "<u2"),  # 0: stored, 8: deflated
        ("mode", "<u2"),  # Unix mode, 0 where the archive has none
    ]
)
STORED, DEFLATED = 0, 8
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # 30 bytes, then name and extra field
CENTRAL_HEADER = np.dtype(
    [
        ("signature", "S4"),
        ("made_by", "<u2"),
        ("needed", "<u2"),
        ("flags", "<u2"),
        ("method", "<u2"),
        ("time", "<u4"),
        ("crc", "<u4"),
        ("packed", "<u4"),
        ("size", "<u4"),
        ("name_length", "<u2"),
        ("extra_length", "<u2"),
        ("comment_length", "<u2"),
        ("disk", "<u2"),
        ("internal", "<u2"),
        ("external", "<u4"),
        ("start", "<u4"),
    ]
)
END, END64, LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
TAIL = 65536 + 22 + 20 + 56  # the longest comment, and the end records before it
MAX_DIRECTORY = 4 << 30
WORTH_SHOWING = 16 << 20  # bytes whose reading takes a while
BOMB_RATIO, BOMB_FLOOR = 250, 1 << 20
SAFE_NAME = re.compile(r"[^/\\\0-\x1f\x7f]+(/[^/\\\0-\x1f\x7f]+)*/?")
UNSAFE_PART = re.compile(r"(^|/)\.{1,2}(/|$)|^[A-Za-z]:")


class NotAnArchiveError(UserError):
    """The file is not a zip, or its end is missing."""


class ArchiveDamagedError(TransientError):
    """The archive's bytes are not what it says of itself."""


class Source(Protocol):
    """An archive that is read by byte ranges: a local file or one behind HTTP."""

    name: str
    size: int
    received: int  #: bytes read, all streams together

    def open(self, start: int, end: int) -> BinaryIO:
        """A stream over bytes [start, end); a short read means the end, never a broken connection."""


@dataclass(frozen=True)
class Directory:
    """Members in the order of the archive. `entries`: [n] of ENTRY; `blob`: the directory's bytes (names lie in it)."""

    archive: str
    entries: np.ndarray
    blob: bytes
    fingerprint: int  #: xxh3_64 of `blob`: names, places, sizes and CRCs

    def __len__(self) -> int:
        return len(self.entries)

    def raw_name(self, number: int) -> bytes:
        entry = self.entries[number]
        start = int(entry["name_offset"])
        return self.blob[start : start + int(entry["name_length"])]

    def name(self, number: int) -> str:
        """Name of a member, '/' between parts."""
        return decode_name(self.raw_name(number), int(self.entries["flags"][number]))

    def names(self) -> list[str]:
        """All names, in order (some 120 bytes of memory each)."""
        fields = zip(*(self.entries[key].tolist() for key in ("name_offset", "name_length", "flags")), strict=True)
        return [decode_name(self.blob[start : start + length], flags) for start, length, flags in fields]


def decode_name(raw: bytes, flags: int) -> str:
    """UTF-8 where bit 11 says so, else code page 437 (APPNOTE 6.3.10, appendix D)."""
    return raw.decode("utf-8" if flags & 0x800 else "cp437", "surrogateescape")


def read_directory(source: Source) -> Directory:
    """Read and parse the central directory. Raises NotAnArchiveError, or ArchiveDamagedError."""
    begin = max(0, source.size - TAIL)
    with source.open(begin, source.size) as stream:
        tail = stream.read(source.size - begin)
    count, size, offset = _find_end(source, tail, begin)
    if size > MAX_DIRECTORY:
        raise ArchiveDamagedError(f"{source.name}: its directory has {size:,} bytes, more than is credible")
    with (
        source.open(offset, offset + size) as stream,
        Progress("Reading the archive's directory", size, "bytes", quiet=size < WORTH_SHOWING) as progress,
    ):
        chunks = []
        while chunk := stream.read(min(1 << 20, size - progress.count)):
            chunks.append(chunk)
            progress.advance(len(chunk))
    blob = b"".join(chunks)
    if len(blob) != size:
        raise ArchiveDamagedError(
            f"{source.name}: its directory has {len(blob):,} bytes instead of {size:,}; it is cut"
        )
    return parse_directory(source.name, blob, count, offset)


def _find_end(source: Source, tail: bytes, begin: int) -> tuple[int, int, int]:
    """(members, bytes, offset) of the central directory, from the end records (APPNOTE 4.3.14 to 4.3.16)."""
    at = tail.rfind(END)
    while at >= 0:
        if at + 22 <= len(tail) and at + 22 + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
            break
        at = tail.rfind(END, 0, at)
    if at < 0:
        raise NotAnArchiveError(f"{source.name} is not a complete zip (it has no end record); fetch it again")
    count, size, offset = struct.unpack_from("<HLL", tail, at + 10)
    directory_end = begin + at
    if at >= 20 and tail[at - 20 : at - 16] == LOCATOR64:
        place = struct.unpack_from("<Q", tail, at - 12)[0] - begin
        if not 0 <= place <= at - 76 or tail[place : place + 4] != END64:
            raise ArchiveDamagedError(
                f"{source.name}: its zip64 end record is not where it should be; the archive is damaged"
            )
        count, size, offset = struct.unpack_from("<QQQ", tail, place + 32)
        directory_end = begin + place
    if offset + size != directory_end:
        raise ArchiveDamagedError(
            f"{source.name}: its directory does not end where its end record says; the archive is damaged"
        )
    return count, size, offset


def parse_directory(archive: str, blob: bytes, count: int, directory_start: int) -> Directory:
    """Parse `count` entries of a central directory of `blob`; `directory_start` is its place in the archive."""
    damaged = ArchiveDamagedError(f"{archive}: its directory does not parse; the archive is damaged, fetch it again")
    places = np.zeros(count if count * 46 <= len(blob) else 0, np.int64)
    if len(places) != count:
        raise damaged
    lengths, at = struct.Struct("<3H"), 0
    for entry in range(count):
        if at + 46 > len(blob):
            raise damaged
        places[entry] = at
        name, extra, comment = lengths.unpack_from(blob, at + 28)
        at += 46 + name + extra + comment
    if at != len(blob):
        raise damaged
    entries = np.zeros(count, ENTRY)
    raw = np.frombuffer(blob, np.uint8)
    for first in range(0, count, 1 << 16):
        here = places[first : first + (1 << 16)]
        headers = raw[here[:, None] + np.arange(46)].view(CENTRAL_HEADER)[:, 0]
        if (headers["signature"] != b"PK\1\2").any():
            raise damaged
        part = entries[first : first + (1 << 16)]
        for key in ("start", "packed", "size", "crc", "name_length", "flags", "method"):
            part[key] = headers[key]
        part["name_offset"] = here + 46
        part["mode"] = np.where(headers["made_by"] >> 8 == 3, headers["external"] >> 16, 0)
        full = (headers["size"] == 0xFFFFFFFF) | (headers["packed"] == 0xFFFFFFFF) | (headers["start"] == 0xFFFFFFFF)
        for i in np.flatnonzero(full).tolist():
            begin = int(here[i]) + 46 + int(headers["name_length"][i])
            _read_zip64(part, i, blob[begin : begin + int(headers["extra_length"][i])], damaged)
    _set_ends(archive, entries, directory_start)
    return Directory(archive, entries, blob, xxhash.xxh3_64_intdigest(blob))


def _read_zip64(entries: np.ndarray, i: int, extra: bytes, damaged: TransientError) -> None:
    """Fill in the 64-bit fields of entry `i` from its extra field (APPNOTE 4.5.3)."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            at += 4
            for key in ("size", "packed", "start"):
                if entries[key][i] == 0xFFFFFFFF:
                    if at + 8 > len(extra):
                        raise damaged
                    entries[key][i] = struct.unpack_from("<Q", extra, at)[0]
                    at += 8
            return
        at += 4 + length


def _set_ends(archive: str, entries: np.ndarray, directory_start: int) -> None:
    """Each member ends where the next begins; ArchiveDamagedError where two overlap, as they do in some bombs."""
    order = np.argsort(entries["start"], kind="stable")
    starts = entries["start"][order]
    ends = np.append(starts[1:], np.uint64(directory_start))
    entries["end"][order] = ends
    smallest = starts + entries["packed"][order] + entries["name_length"][order] + np.uint64(LOCAL_HEADER.size)
    wrong = np.flatnonzero((smallest > ends) | (smallest < starts))
    if len(wrong):
        raise ArchiveDamagedError(
            f"{archive}: member {int(order[wrong[0]]) + 1} overlaps what follows; the archive is damaged"
        )


def check_name(archive: str, name: str) -> None:
    """UserError if `name` is absolute, climbs out of its folder, or holds what no file name should."""
    if not SAFE_NAME.fullmatch(name) or UNSAFE_PART.search(name):
        raise UserError(f"{archive} holds a member named {name!r}, which could leave the folder: archive refused")


def check_safe(directory: Directory) -> None:
    """Refuse an archive, by the member's name, that could write outside its folder, over itself, or fill the disk.

    Raises UserError: unsafe names, links and devices, names that differ in case alone, encrypted or oddly packed
    members, and sizes out of all proportion to the packed bytes.
    """
    archive, entries = directory.archive, directory.entries
    folded = np.zeros(len(directory), np.uint64)
    fields = zip(*(entries[key].tolist() for key in ("name_offset", "name_length", "flags")), strict=True)
    for i, (start, length, flags) in enumerate(fields):
        name = decode_name(directory.blob[start : start + length], flags)
        check_name(archive, name)
        folded[i] = xxhash.xxh3_64_intdigest(name.casefold().encode("utf-8", "surrogateescape"))
    order = np.argsort(folded, kind="stable")
    same = np.flatnonzero(folded[order][1:] == folded[order][:-1])
    if len(same):
        one, other = (directory.name(int(order[same[0] + k])) for k in (0, 1))
        raise UserError(f"{archive} holds both {one!r} and {other!r}, the same file on some disks: archive refused")

    def refuse(wrong: np.ndarray, why: str) -> None:
        for i in np.flatnonzero(wrong)[:1]:
            raise UserError(f"{archive} holds {directory.name(int(i))!r}, {why}: archive refused")

    kind = stat.S_IFMT(0xFFFF) & entries["mode"].astype(np.int64)
    refuse((kind != 0) & (kind != stat.S_IFREG) & (kind != stat.S_IFDIR), "a link or a special file")
    refuse(entries["flags"] & 1 != 0, "which is encrypted")
    refuse((entries["method"] != STORED) & (entries["method"] != DEFLATED), "packed in a way that is not known here")
    stored = entries["method"] == STORED
    refuse(stored & (entries["size"] != entries["packed"]), "whose two sizes disagree")
    bomb = ~stored & (entries["size"] > BOMB_FLOOR) & (entries["size"] // BOMB_RATIO > entries["packed"])
    refuse(bomb, f"which says it unpacks to more than {BOMB_RATIO} times its packed bytes")
