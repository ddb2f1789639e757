"""A sample's label as text: one rule for members of tar files and for columns of parquet files."""

import math
import re
from typing import Any

_WHOLE = re.compile(r"-?\d+\.0+")  # a number, as a floating-point one
_NEGATIVE = re.compile(r"-\d+")


def label_text(value: Any) -> str | None:
    """A label as text, of a whole number its digits. None where `value` is not a label: nothing, a negative number (it
    stands for none), a number that isn't whole, a truth value, several labels, or a dict."""
    if isinstance(value, list | tuple):
        return label_text(value[0]) if len(value) == 1 else None
    if value is None or isinstance(value, bool | dict):
        return None
    if isinstance(value, float):  # of integers with gaps, as pandas writes them
        return label_text(int(value)) if math.isfinite(value) and value == int(value) else None
    text = value.decode("utf-8-sig", "replace") if isinstance(value, bytes) else str(value)
    text = text.strip().strip("\0").strip()
    if _WHOLE.fullmatch(text):
        text = text.partition(".")[0]
    return None if not text or _NEGATIVE.fullmatch(text) else text
