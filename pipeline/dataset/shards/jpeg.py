"""Where things lie in a JPEG with restart markers: its header and its restart intervals.

Restart markers (ITU T.81, E.1.4 and F.1.1.5.2) divide the entropy-coded data into intervals of equally many MCUs that
can be decoded independently of each other. Here an interval begins with each row of MCUs.
"""

from typing import NamedTuple

import numpy as np

_SOF_BASELINE, _SOF_EXTENDED, _SOF_PROGRESSIVE = 0xC0, 0xC1, 0xC2
_DHT, _DAC, _SOI, _EOI, _SOS, _DRI = 0xC4, 0xCC, 0xD8, 0xD9, 0xDA, 0xDD
_SOF = {*range(0xC0, 0xD0)} - {_DHT, 0xC8, _DAC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_MARKERS = np.arange(1 << 16, dtype=np.uint8) % 8 + 0xD0


class Frame(NamedTuple):
    """A JPEG's frame header and the place of its first scan.

    coding: the low byte of the SOF marker. precision: bits a sample. mcu_width, mcu_height: pixels of an MCU in an
    interleaved scan (of a block, with one component). sof: offset of the height field. interval: of DRI, in MCUs, 0 if
    there is none. data: offset of the first scan's entropy-coded data. interleaved: does that scan hold all components?
    """

    coding: int
    precision: int
    width: int
    height: int
    components: int
    mcu_width: int
    mcu_height: int
    sof: int
    interval: int
    data: int
    interleaved: bool

    @property
    def mcu_columns(self) -> int:
        return -(-self.width // self.mcu_width)

    @property
    def mcu_rows(self) -> int:
        return -(-self.height // self.mcu_height)


def read_frame(data: bytes) -> Frame | None:
    """The frame of a JPEG's first image; None where `data` is no JPEG or its header is cut off."""
    if data[:2] != b"\xff\xd8":
        return None
    at, interval, frame = 2, 0, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:
            at += 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : end]
        if end > len(data) or marker == _EOI:
            return None
        if marker in _SOF:
            if len(segment) < 6 or len(segment) < 6 + 3 * segment[5]:
                return None
            frame = marker, segment, at + 5
        elif marker == _DRI and len(segment) >= 2:
            interval = int.from_bytes(segment[:2], "big")
        elif marker == _SOS:
            return None if frame is None or not segment else _make_frame(*frame, interval, end, segment[0])
        at = end
    return None


def _make_frame(coding: int, sof: bytes, at: int, interval: int, data: int, in_scan: int) -> Frame | None:
    count = sof[5]
    factors = [divmod(sof[7 + 3 * i], 16) for i in range(count)]
    if not count or not all(h and v for h, v in factors):
        return None
    h, v = (max(factor[i] for factor in factors) if count > 1 else 1 for i in range(2))
    height, width = int.from_bytes(sof[1:3], "big"), int.from_bytes(sof[3:5], "big")
    if not width or not height:
        return None
    return Frame(coding, sof[0], width, height, count, 8 * h, 8 * v, at, interval, data, in_scan == count)


def is_transcodable(frame: Frame) -> bool:
    """Can restart markers be added to it: 8 bits, Huffman coded (baseline, extended or progressive), gray or three
    components?"""
    return (
        frame.precision == 8
        and frame.components in (1, 3)
        and frame.coding in (_SOF_BASELINE, _SOF_EXTENDED, _SOF_PROGRESSIVE)
    )


def choose_interval(columns: int, wanted: int) -> int:
    """The divisor of `columns` (MCUs a row) nearest to `wanted`, the smaller of two."""
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    return min(divisors, key=lambda n: abs(n - wanted))


def find_intervals(data: bytes, frame: Frame) -> np.ndarray | None:
    """Bytes of each restart interval with the two bytes of its closing marker (RST, or EOI), int64 [MCU rows, intervals
    a row]; None unless the JPEG is baseline with one scan, an interval begins with each row, and nothing follows EOI.
    """
    if frame.coding != _SOF_BASELINE or not frame.interleaved or not frame.interval:
        return None
    columns, rest = divmod(frame.mcu_columns, frame.interval)  # intervals a row
    if rest or data[-2:] != b"\xff\xd9":
        return None
    body = np.frombuffer(data, np.uint8, offset=frame.data)
    at = np.flatnonzero(body[:-1] == 0xFF) + 1
    at = at[body[at] != 0]  # a zero after 0xFF: stuffed data
    count = columns * frame.mcu_rows
    if len(at) != count or not np.array_equal(body[at[:-1]], number_markers(count - 1)):
        return None
    return np.diff(at + 1, prepend=0).reshape(frame.mcu_rows, columns)


def number_markers(count: int) -> np.ndarray:
    """The second bytes of the first restart markers of a JPEG: RST0 to RST7 in turns, uint8 [count]."""
    return _MARKERS[:count] if count <= len(_MARKERS) else np.resize(_MARKERS, count)
