"""MATLAB's MAT files of level 5, as far as `meta.mat` of ImageNet's development kit needs them.

Source: "MAT-File Format", MathWorks, chapter 1 (level 5). SciPy reads them too; it is too large to be
required for one file.
"""

import struct
import zlib
from typing import Any

import numpy as np

_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
#: Data types of elements that hold numbers or characters.
_TYPES = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8", 16: "u1"}
_UTF16 = (4, 17)
_HEADER = 128  # bytes


def read_mat(data: bytes) -> dict[str, Any]:
    """The variables of a file: numbers as arrays, text as str, a struct array as a list of dicts (fields -> values).

    Raises ValueError for anything but a little-endian MAT file of level 5.
    """
    if len(data) < _HEADER or data[126:128] != b"IM":
        raise ValueError("no MAT file of level 5")
    found: dict[str, Any] = {}
    try:
        at = _HEADER
        while at + 8 <= len(data):
            kind, body, at = _element(data, at)
            if kind == _COMPRESSED:
                kind, body, _ = _element(zlib.decompress(body), 0)
            if kind == _MATRIX:
                name, value = _matrix(body)
                found[name] = value
    except (struct.error, zlib.error, IndexError, OverflowError) as error:
        raise ValueError(f"the MAT file is damaged ({error})") from error
    return found


def _element(data: bytes, at: int) -> tuple[int, bytes, int]:
    """(data type, bytes, where the next element begins) of the element at `at`."""
    kind, size = struct.unpack_from("<LL", data, at)
    if kind >> 16:  # a small element: its size and its data are in the tag
        return kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)], at + 8
    begin = at + 8
    if begin + size > len(data):
        raise ValueError("the MAT file is cut")
    end = begin + size
    return kind, data[begin:end], end if kind == _COMPRESSED else begin + -(-size // 8) * 8


def _matrix(body: bytes) -> tuple[str, Any]:
    """(name, value) of a matrix element."""
    if not body:
        return "", np.zeros(0)
    _, flags, at = _element(body, 0)
    _, sizes, at = _element(body, at)
    _, name, at = _element(body, at)
    kind, count = flags[0], int(np.prod(np.frombuffer(sizes, "<i4"), dtype=np.int64))
    if kind == _STRUCT:
        return name.decode("latin1"), _structs(body, at, count)
    if kind == _CELL:
        cells = []
        for _ in range(count):
            _, cell, at = _element(body, at)
            cells.append(_matrix(cell)[1])
        return name.decode("latin1"), cells
    data_type, values, _ = _element(body, at)
    if kind == _CHAR:
        return name.decode("latin1"), values.decode("utf-16-le" if data_type in _UTF16 else "utf-8", "replace")
    if data_type not in _TYPES:
        raise ValueError(f"the MAT file holds data of type {data_type}")
    return name.decode("latin1"), np.frombuffer(values, _TYPES[data_type])


def _structs(body: bytes, at: int, count: int) -> list[dict[str, Any]]:
    _, length, at = _element(body, at)
    _, names, at = _element(body, at)
    step = int(np.frombuffer(length, "<i4")[0])
    fields = [names[i : i + step].split(b"\0")[0].decode("latin1") for i in range(0, len(names), step)]
    rows = []
    for _ in range(count):
        row = {}
        for field in fields:
            _, value, at = _element(body, at)
            row[field] = _matrix(value)[1]
        rows.append(row)
    return rows
