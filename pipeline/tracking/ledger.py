"""The ledger, `metrics.jsonl`: one JSON object a line, and the truth about a run.

`ledger_rows.py` says what rows are, and reads them. When a run resumes at step k, the rows of later steps are taken out
first: they will be written again.

Rows that the disk refuses, or that go to a file which is no longer in its place, are kept in memory and written as soon
as that ends.
"""

import errno
import json
import math
import os
import threading
import time
from pathlib import Path

from pipeline.files import atomic_write
from pipeline.tracking.ledger_rows import read_rows, to_word


def _line(row: dict) -> bytes:
    return json.dumps({key: to_word(value) for key, value in row.items()}).encode() + b"\n"


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
