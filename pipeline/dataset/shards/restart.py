"""The restart table of a shard, and a window of a JPEG cut out of it as a small JPEG of its own.

A table holds an entry for each sample that has restart markers (`jpeg.py`): its header, the bytes of each restart
interval, and a checksum of each row of intervals. With it a loader reads from the disk only the rows of MCUs that a
window touches, and hands the decoder only the intervals that it touches. Entries are little-endian, without gaps:

    checksum   uint32            xxh3_64 of what follows, seeded with the digest of the sample's bytes; low 32 bits
    geometry   7 x uint16        width, height (pixels); rows of intervals, intervals a row; pixels of an interval, of
                                 an MCU's width and of its height
    sof, data  2 x uint16        offset of the frame header's height; bytes of the header
    header     uint8 [data]
    checksums  uint32 [rows]     of each row of intervals, its markers included: xxh3_64, low 32 bits
    lengths    uint16 [rows, intervals a row]     bytes of each interval with the marker that ends it
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from pipeline.counts import count
from pipeline.dataset.index.index import Index, Split
from pipeline.dataset.shards.jpeg import find_intervals, number_markers, read_frame

TABLE = ".restart"  #: suffix of a table; it lies beside its shard
MAGIC = b"RESTART1"  #: the first bytes of a table
_HEAD = struct.Struct("<I9H")
_MASK = 0xFFFFFFFF
_MARGIN = 2  # pixels: the decoder interpolates chroma that is stored at half size from its neighbors
_NARROWEST = 5  # pixels: libjpeg does not interpolate chroma of two columns or less
_EOI = 0xD9


class TableError(ValueError):
    """A table's entry is damaged, or belongs to other bytes than the sample's."""


def table_name(shard: str) -> str:
    """The file beside a shard: `train-000000.tar` has `train-000000.restart`."""
    return str(Path(shard).with_suffix(TABLE))


def list_shard_files(split: Split) -> Iterator[str]:
    """The shards of a split, and their tables."""
    for shard in split.shards:
        yield shard
        if split.restart is not None:
            yield table_name(shard)


def has_shard_files(index: Index) -> bool:
    """Is every shard there, and every table?"""
    return all((index.root / name).is_file() for split in index.splits.values() for name in list_shard_files(split))


def make_entry(data: bytes, digest: int) -> bytes | None:
    """The entry of a JPEG. digest: xxh3_64 of `data`. None where its intervals can't be used (see `find_intervals`), or
    one is longer than 65,535 bytes."""
    frame = read_frame(data)
    lengths = None if frame is None else find_intervals(data, frame)
    if frame is None or lengths is None or lengths.max() >= 1 << 16 or frame.data >= 1 << 16:
        return None
    rows, columns = lengths.shape
    wide = min(frame.interval * frame.mcu_width, (1 << 16) - 1)  # of a single interval any width will do
    ends = (frame.data + lengths.sum(1).cumsum()).tolist()
    view = memoryview(data)
    starts = [frame.data, *ends[:-1]]
    checksums = [xxhash.xxh3_64_intdigest(view[a:b]) & _MASK for a, b in zip(starts, ends, strict=True)]
    geometry = frame.width, frame.height, rows, columns, wide, frame.mcu_width, frame.mcu_height, frame.sof, frame.data
    body = b"".join(
        (
            _HEAD.pack(0, *geometry)[4:],
            data[: frame.data],
            np.array(checksums, "<u4").tobytes(),
            lengths.astype("<u2").tobytes(),
        )
    )
    return _checksum(body, digest).to_bytes(4, "little") + body


def _checksum(body: bytes, digest: int) -> int:
    return xxhash.xxh3_64_intdigest(body, digest) & _MASK


def is_intact(entry: bytes, digest: int) -> bool:
    """Is an entry whole, and that of the sample with this digest?"""
    return len(entry) >= _HEAD.size and _checksum(entry[4:], digest) == int.from_bytes(entry[:4], "little")


class Cut(NamedTuple):
    """A window's part of a JPEG: which bytes to read, and how to make a JPEG of them.

    left, top: where it begins in the picture, pixels; width, height: of the part. start, size: the bytes to read, from
    the sample's first byte on.
    """

    left: int
    top: int
    width: int
    height: int
    start: int
    size: int
    header: bytes
    sof: int
    lengths: np.ndarray  # uint16 [rows, intervals a row] of the rows read: bytes of each interval
    columns: slice  # the intervals of each row that are taken
    ends: np.ndarray  # int64 [rows, intervals a row]: where each interval ends in the bytes read
    checksums: np.ndarray  # uint32 [rows]

    def assemble(self, data: bytes | memoryview) -> bytearray:
        """The part as a JPEG of its own, from the bytes read. Raises TableError where they have changed."""
        if len(data) != self.size:
            raise TableError(f"has {count(len(data), 'byte')} of {self.size:,} in its shard")
        ends, (first, last), view = self.ends, (self.columns.start, self.columns.stop), memoryview(data)
        stops = ends[:, -1].tolist()
        starts = [0, *stops[:-1]]
        rows = [view[a:b] for a, b in zip(starts, stops)]  # noqa: B905 - of one length, here and below: quicker
        if [digest & _MASK for digest in map(xxhash.xxh3_64_intdigest, rows)] != self.checksums.tolist():
            raise TableError("its bytes have changed since it was packed")
        if last - first != ends.shape[1]:
            starts = ends[:, first - 1].tolist() if first else starts
            rows = [view[a:b] for a, b in zip(starts, ends[:, last - 1].tolist())]  # noqa: B905
        made = bytearray().join((self.header, *rows))
        struct.pack_into(">HH", made, self.sof, self.height, self.width)
        taken = self.lengths[:, self.columns].ravel().astype(np.int64)
        taken[0] += len(self.header) - 1  # an interval's marker ends it, so that its second byte is the interval's last
        np.frombuffer(made, np.uint8)[np.add.accumulate(taken)] = number_markers(len(taken))
        made[-1] = _EOI
        return made


def plan_cut(entry: bytes, digest: int, window: tuple[int, int, int, int]) -> Cut | None:
    """How to cut a window (left, top, width, height; pixels) out of the sample that `entry` describes.

    The part is the window, a margin with which its pixels stay equal bit for bit, and what completes rows of MCUs and
    intervals. None where that is the whole picture. digest: that of the sample's bytes in the index. Raises TableError.
    """
    if len(entry) < _HEAD.size:
        raise TableError("the restart table is cut off")
    checksum, width, height, rows, columns, wide, mcu_width, mcu_height, sof, data = _HEAD.unpack_from(entry)
    if _checksum(entry[4:], digest) != checksum:
        raise TableError("the restart table does not fit the shard")
    left, top, right, bottom = window[0], window[1], window[0] + window[2], window[1] + window[3]
    if mcu_width > 8:
        left, right = max(left - _MARGIN, 0), right + _MARGIN
    if mcu_height > 8:
        top, bottom = max(top - _MARGIN, 0), bottom + _MARGIN
    first, last = left // wide, min(-(-right // wide), columns)
    up, down = top // mcu_height, min(-(-bottom // mcu_height), rows)
    if first and width - first * wide < _NARROWEST:
        first -= 1
    if down - up == rows and last - first == columns:
        return None
    at = _HEAD.size + data
    checksums = np.frombuffer(entry, "<u4", down - up, at + 4 * up)
    lengths = np.frombuffer(entry, "<u2", down * columns, at + 4 * rows)
    ends = np.add.accumulate(lengths.astype(np.int64))  # less time than `cumsum` with a conversion
    start = int(ends[up * columns - 1]) if up else 0
    lengths, ends = lengths[up * columns :].reshape(-1, columns), ends[up * columns :].reshape(-1, columns)
    if start:
        ends -= start
    x, y = first * wide, up * mcu_height
    right, bottom = min(last * wide, width), min(down * mcu_height, height)
    size, header, taken = int(ends[-1, -1]), entry[_HEAD.size : at], slice(first, last)
    return Cut(x, y, right - x, bottom - y, data + start, size, header, sof, lengths, taken, ends, checksums)
