"""TensorBoard as a view of the ledger: one event for each row, in the run folder's `tensorboard/`.

A restart repeats steps, and a kill loses events that were not written yet. The ledger has every step once, so each
start writes the whole history from it again and removes the files of earlier starts. A thread does it: training does
not wait, not even for the history of a long run.
"""

import importlib.util
import math
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.logs import logger
from pipeline.tracking.ledger_rows import read_rows
from pipeline.tracking.view import View

_FLUSH_S = 10  # after which events are in the file
_CLOSE_S = 30.0
_GROUPS = {"train": "train", "eval": "validation"}


def check_installed() -> None:
    """Raises UserError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tracking.tensorboard true: the package tensorboard is not installed; pip install tensorboard, or give "
            "--tracking.tensorboard false"
        )


class TensorBoardView(View):
    """Writes rows to event files.

    Args:
        folder: of the event files; made if missing.
        ledger: `metrics.jsonl`, already without the rows that are to be written again.
        warn: tells the user that it failed, once.
    """

    def __init__(self, folder: Path, ledger: Path, warn: Callable[[str], None] = logger.warning):
        self.folder, self.ledger, self.warn = folder, ledger, warn
        self._failed = False
        self._waiting: queue.SimpleQueue[Callable[[Any], Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="TensorBoard", daemon=True)
        self.after_rewind()
        self._thread.start()

    # --- called by the training thread

    def log(self, row: dict) -> None:
        now = time.time()
        self._add(lambda writer: writer.add_event(_event(row, now)))

    def after_rewind(self) -> None:
        size = self.ledger.stat().st_size if self.ledger.exists() else 0
        self._add(lambda writer: self._begin(writer, size))

    def show(self, pictures: list[Path], step: int) -> None:
        if pictures:
            self._add(lambda writer: writer.add_event(_picture_event(pictures, step)))

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(_CLOSE_S)  # what is missing then is written by the next start

    def _add(self, task: Callable[[Any], Any]) -> None:
        if not self._failed:
            self._waiting.put(task)

    # --- the thread

    def _run(self) -> None:
        writer: Any = None
        try:
            for task in iter(self._waiting.get, None):
                writer = task(writer) or writer
            writer.close()
        except Exception as error:  # whatever the disk or the package says, training continues
            self._failed = True
            self.warn(f"TensorBoard: {type(error).__name__}: {error}; not used any more, metrics.jsonl has everything")

    def _begin(self, writer: Any, size: int) -> Any:
        """A new file with the rows in the ledger's first `size` bytes, in place of all others."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if writer is not None:
            writer.close()
        before = sorted(self.folder.glob("events.out.tfevents.*"))
        writer = EventFileWriter(str(self.folder), flush_secs=_FLUSH_S, filename_suffix=f".{time.time_ns()}")
        # A TensorBoard that is running forgets what it has read of the files before.
        writer.add_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        for row in read_rows(self.ledger, size):
            if row.get("kind") in _GROUPS:
                writer.add_event(_event(row, time.time()))
        writer.flush()
        for path in before:
            path.unlink(missing_ok=True)
        return writer


def numbers_of(row: dict) -> Iterator[tuple[str, float]]:
    """The finite numbers of a row: ("train/loss", 6.9), ("validation/val_top1", 70.1)."""
    for key, value in row.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key != "step" and number and math.isfinite(value):
            yield f"{_GROUPS[row['kind']]}/{key}", float(value)


def _event(row: dict, when: float) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers_of(row)]
    return Event(wall_time=when, step=row["step"], summary=Summary(value=values))


def _picture_event(pictures: list[Path], step: int) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = []
    for path in pictures:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of a PNG's first chunk
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        values.append(Summary.Value(tag=f"report/{path.stem}", image=image))
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))
