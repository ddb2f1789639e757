"""The ledger, `metrics.jsonl`: one JSON object a line, and the truth about a run.

Rows have a `kind`: "train" (one for each step, strictly rising, none twice, none missing), "eval" and "event". When a
run resumes at step k, the rows of later steps are taken out first: they will be written again.

Rows that the disk refuses, or that go to a file which is no longer in its place, are kept in memory and written as soon
as that ends.
"""

import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.counts import count
from pipeline.files import atomic_write

TRAINING_UNREADABLE = "training_unreadable"  #: the event of a training image that is replaced from now on
VALIDATION_UNREADABLE = "validation_unreadable"  #: the event of validation images that are left out of the scores
_NUMBERS = ("epoch", "loss", "top1", "lr", "images_per_s", "data_wait_fraction", "grad_norm")
_FINITE = ("epoch", "val_top1", "val_top5", "val_ema_top1", "val_ema_top5")
_WORDS = ("nan", "inf", "-inf")  # of `_finite`
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
            yield from _row(line)


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
            for line in reversed(lines):
                yield from _row(line)
        yield from _row(rest or b"")


def _row(line: bytes) -> Iterator[dict]:
    row = parse_row(line)
    if row is not None:
        yield row


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


def _line(row: dict) -> bytes:
    return json.dumps({key: _finite(value) for key, value in row.items()}).encode() + b"\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_word(value: Any) -> Any:
    """A value of a row as it was before it was written: NaN and infinity, where it is one of their words."""
    return float(value) if isinstance(value, str) and value in _WORDS else value


LOOK_EVERY_S = 5.0  # whether the file is still in its place


class Ledger:
    """Appends rows to `metrics.jsonl`.

    Args:
        path: the file, made if missing.
        step: rows of training steps and evaluations after this many steps are removed first. The row of step s, the
            s-th from 1, says that s steps are done.

    `refusal` is what the disk said last, None while all is well.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.refusal: OSError | None = None
        self._refusals = 0
        self._turn = threading.Lock()  # `sync` is called by the thread that writes checkpoints
        self._take_out(step)
        self._open()

    def rewind(self, step: int, *events: dict) -> None:
        """Take out the rows of steps after `step`, and add `events`: both or neither, and on the disk."""
        self.sync()
        self._take_out(step, *events)
        self.file.close()
        self._open()

    def _take_out(self, step: int, *events: dict) -> None:
        """Write the file again, without the rows of steps after `step` and with `events`, if that changes it."""
        rows = list(read_rows(self.path))
        keep = [row for row in rows if row.get("kind") == "event" or row.get("step", 0) <= step]
        self.evaluations = [row for row in keep if row.get("kind") == "eval"]
        #: of the training rows in the file now
        self.losses = [row.get("loss") for row in keep if row.get("kind") == "train"]
        if len(keep) < len(rows) or events or self._torn():
            atomic_write(self.path, b"".join(map(_line, [*keep, *events])))

    def _open(self) -> None:
        self.file = self.path.open("a+b", buffering=0)
        self._safe = os.fstat(self.file.fileno()).st_size  # bytes of the file that are on the disk for sure
        self._rest = bytearray()  # what comes after them
        self._written = 0  # bytes of the rest that the operating system has
        self._looked = time.monotonic()

    def _torn(self) -> bool:
        if not self.path.exists() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def append(self, row: dict) -> None:
        """Add a row; it is written at once or, if the write fails (`refusal`), with a later row."""
        with self._turn:
            self._rest += _line(row)
            try:
                self._write_rest()
            except OSError as error:
                self._refused(error)
        if row.get("kind") == "eval":
            self.evaluations.append(row)

    def sync(self) -> None:
        """Wait until every row is on the disk. Raises OSError where that refuses; the rows are kept."""
        with self._turn:
            try:
                self._looked = -math.inf
                self._write_rest()
            except OSError as error:
                self._refused(error)
                raise
            written, refusals, descriptor = self._written, self._refusals, os.dup(self.file.fileno())
        try:
            os.fsync(descriptor)
        except OSError as error:
            with self._turn:
                self._refused(error)
            raise
        finally:
            os.close(descriptor)
        with self._turn:
            if refusals == self._refusals:
                self._safe += written
                self._written -= written
                del self._rest[:written]

    def _refused(self, error: OSError) -> None:
        """After a refusal nothing counts as written that was not synced: the disk may have lost it."""
        self.refusal, self._written = error, 0
        self._refusals += 1

    def _write_rest(self) -> None:
        if self.refusal is not None or time.monotonic() - self._looked > LOOK_EVERY_S:
            self._look()
        if self.refusal is not None:
            os.ftruncate(self.file.fileno(), self._safe)
        view = memoryview(bytes(self._rest[self._written :]))
        while view:
            count = self.file.write(view)
            self._written += count
            view = view[count:]
        self.refusal = None

    def _look(self) -> None:
        """Is the open file still the one at its path? One that was deleted is written again; for another that took its
        place (an unmounted file system, a folder moved away) OSError is raised."""
        here = os.fstat(self.file.fileno())
        if here.st_nlink == 0:
            self.path.parent.mkdir(exist_ok=True)
            rest = self._rest
            atomic_write(self.path, os.pread(self.file.fileno(), self._safe, 0))
            self.file.close()
            self._open()
            self._rest = rest
            raise FileNotFoundError(errno.ENOENT, "it was deleted", str(self.path))
        there = self.path.stat()
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise FileNotFoundError(errno.ENOENT, "another file is in its place", str(self.path))
        self._looked = time.monotonic()

    def close(self) -> None:
        """Raises OSError where rows can't be written; they are lost."""
        try:
            self.sync()
        finally:
            self.file.close()
