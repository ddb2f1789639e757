"""What to do when stdout or stderr fails: Ctrl-C has ended `tee` as well, the terminal is closed, a disk is full.

Training goes on without them; other verbs say so in one line.
"""

import contextlib
import errno
import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_FULL = (errno.ENOSPC, errno.EDQUOT)  # there may be room again; other errors last


def prepare_output() -> None:
    """For a process of our own. Standard streams that it was started without lead nowhere: otherwise the next file that
    is opened would take their place. A character that the locale lacks is shown by its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def failure_of_stdout() -> OSError | None:
    """Why an empty line can't be written to stdout, to which nothing is written from now on. None: it can."""
    try:
        print(flush=True)
    except OSError as error:
        _empty(sys.stdout, for_good=True)
        return error
    return None


def _empty(stream: TextIO, for_good: bool) -> None:
    """Drop what a stream's buffer holds, which would otherwise fail at each flush, the one at the process's end too.
    for_good: and all that is written to its file later."""
    with contextlib.suppress(OSError, ValueError):
        fd = stream.fileno()
        kept = None if for_good else os.dup(fd)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, fd)
            stream.flush()
        finally:
            os.close(nowhere)
            if kept is not None:
                os.dup2(kept, fd)
                os.close(kept)


class _Unfailing(io.TextIOBase):
    """A text stream whose lines are dropped where they can't be written."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._lock = threading.RLock()
        self.problem: OSError | None = None  # the first one

    def write(self, text: str) -> int:
        """Returns len(text), also where it was dropped."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """A full disk is tried again with the next line."""
        with self._lock:
            _empty(self._stream, for_good=error.errno not in _FULL)
        self.problem = self.problem or error

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Meanwhile stdout and stderr drop what can't be written, and exist where the process was started without them.
    Whoever can still read one of them is told, at the end, that the other could not be written."""
    before = sys.stdout, sys.stderr
    if any(isinstance(stream, _Unfailing) for stream in before):
        yield
        return
    ours = [_Unfailing(stream if stream is not None else _nowhere()) for stream in before]
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        for stream, other, name in zip(ours, reversed(ours), ("stdout", "stderr"), strict=True):
            if stream.problem is not None and other.problem is None:
                print(f"warning: lines of {name} are lost ({stream.problem.strerror})", file=other, flush=True)
        if sys.stdout is ours[0]:  # else somebody wraps it, who will put it back
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]


def _nowhere() -> TextIO:
    """What is written to it is dropped. It is open until the process ends."""
    return Path(os.devnull).open("w", encoding="utf-8")
