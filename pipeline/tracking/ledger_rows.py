"""The rows of a ledger: read, checked, and what they say of a run.

Rows have a `kind`: "train" (one for each step, strictly rising, none twice, none missing), "eval" and "event". Knows no
torch. `ledger.py` writes them.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.counts import count

TRAINING_UNREADABLE = "training_unreadable"  #: the event of a training image that is replaced from now on
VALIDATION_UNREADABLE = "validation_unreadable"  #: the event of validation images that are left out of the scores
_NUMBERS = ("epoch", "loss", "top1", "lr", "images_per_s", "data_wait_fraction", "grad_norm")
_FINITE = ("epoch", "val_top1", "val_top5", "val_ema_top1", "val_ema_top5")
_WORDS = ("nan", "inf", "-inf")  # of `to_word`
_OF_STARTS = ("last_step", "world_size")
_YEAR_10000 = 253402300800.0


def read_rows(path: Path, size: int | None = None) -> Iterator[dict]:
    """The rows of a ledger, or of its first `size` bytes; a last line that was cut by a crash is left out."""
    position = 0
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if not line.endswith(b"\n") or (size is not None and position > size):
                return
            if row := parse_row(line):
                yield row


def read_rows_backwards(path: Path, block: int = 1 << 16) -> Iterator[dict]:
    """What `read_rows` yields, from the last row to the first. Only as much of the file is read as is asked for,
    `block` bytes at a time."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        rest: bytes | None = None  # the end of a line that begins in the block before
        while position:
            start = max(0, position - block)
            file.seek(start)
            text = file.read(position - start)
            position = start
            if rest is None:
                text, newline, _ = text.rpartition(b"\n")  # what comes behind was cut by a crash
                if not newline:
                    continue
                rest = b""
            rest, *lines = (text + rest).split(b"\n")
            yield from filter(None, map(parse_row, reversed(lines)))
        yield from filter(None, [parse_row(rest or b"")])


def parse_row(line: bytes) -> dict | None:
    """The row of a line; None where the line is none, or one that was damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_sound(row) else None


def _is_sound(row: dict) -> bool:
    """Are the values of a row, which others calculate with, of their types? Fields may be missing, but for the step of
    a training step or an evaluation, and an evaluation's top-1."""
    kind = row.get("kind")
    if not isinstance(kind, str | None) or not _is_whole(row.get("step", 0)):
        return False
    if kind in ("train", "eval"):
        known = "step" in row and (kind == "train" or "val_top1" in row)
        numbers = ((name, value) for name, value in row.items() if name in _NUMBERS or name.startswith("val_"))
        values = all(
            _is_number(value) or (name not in _FINITE and isinstance(value, str) and value in _WORDS)
            for name, value in numbers
        )
        return known and values and all(_is_whole(row.get(name, 0)) for name in ("images", "left_out"))
    when = row.get("time", 0)
    return _is_number(when) and abs(when) < _YEAR_10000 and all(_is_whole(row.get(name, 0)) for name in _OF_STARTS)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def is_start(row: dict) -> bool:
    """Does this row say that a process began to train, at step 0 or from a checkpoint?"""
    return row.get("event") in ("started", "resumed")


def world_sizes(starts: Iterable[dict]) -> list[tuple[int, int]]:
    """(first step, number of ranks) of each stretch of a run with one world size, from its rows of starts."""
    found: list[tuple[int, int]] = []
    for row in starts:
        step, size = row.get("step"), row.get("world_size")
        if isinstance(step, int) and isinstance(size, int) and (not found or found[-1][1] != size):
            found.append((step, size))
    return found


def world_sizes_in_words(sizes: list[tuple[int, int]], most: int = 6) -> str:
    """Of `world_sizes`, the last ones; empty where the number of ranks has never changed."""
    if len(sizes) < 2:
        return ""
    words = [f"{size} from step {step:,}" for step, size in sizes[-most:]]
    return ("..., " if len(sizes) > most else "") + ", ".join(words)


def lost_steps(rows: Iterable[dict], done: int) -> list[tuple[int, int]]:
    """(first, last) of each stretch of training steps up to `done` that have no row in a run's ledger. Its rows begin
    at step 1, or after another run's checkpoint. done: steps that the run has done, also where no row is left."""
    rows = list(rows)
    begins = {0} | {row["step"] for row in rows if _is_beginning(row)}
    steps = [row["step"] for row in rows if row.get("kind") == "train" and row["step"] <= done]
    before = max((step for step in begins if step < (steps[0] if steps else done + 1)), default=0)
    lost = []
    for step in [*steps, done + 1]:
        if before + 1 < step:
            lost.append((before + 1, step - 1))
        before = max(before, step)
    return lost


def _is_beginning(row: dict) -> bool:
    """Does this row say that a run began with another run's checkpoint?"""
    return row.get("event") == "continued" or ("resume_option" in row and row.get("of_another_run", True))


def lost_in_words(lost: Sequence[tuple[int, int]]) -> str:
    """Of `lost_steps`: "steps 1 to 8, of step 12"."""
    words = [f"step {first:,}" if first == last else f"steps {first:,} to {last:,}" for first, last in lost[:3]]
    more = f" and {count(len(lost) - 3, 'more stretch')}" if len(lost) > 3 else ""
    return ", of ".join(words) + more


def last_steps(path: Path) -> dict[str, int]:
    """Kind of row ("train", "eval") -> its last step in a ledger."""
    return {row["kind"]: row["step"] for row in read_rows(path) if row.get("kind") in ("train", "eval")}


def to_word(value: Any) -> Any:
    """A value as it is written: JSON has no NaN or infinity, they become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_word(value: Any) -> Any:
    """The value that `to_word` was given."""
    return float(value) if isinstance(value, str) and value in _WORDS else value
