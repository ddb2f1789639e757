"""Signals and the stop file: how a run is asked to save and go. Installed before torch is imported; knows no torch.

A request is only noted here. It rides on the next step's report to all ranks, so that all stop at the same step,
whichever rank or node was told first.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK
from pipeline.files import read_note
from pipeline.training.ranks.launcher import current_launch

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # <sys/prctl.h>
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Has somebody asked this process to stop? `reason` and `since` (time.monotonic) say who and when.

    `regroup`: has `pipeline launch` asked it to save and stop because nodes joined? SIGUSR2, that is.
    """

    def __init__(self, install: bool = True):
        self.reason: str | None = None
        self.regroup = False
        self.since = 0.0
        self._file: Path | None = None
        if install:
            for number in _SIGNALS:
                signal.signal(number, self._note)
            signal.signal(signal.SIGUSR2, self._note_usr2)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
                signal.signal(signal.SIGHUP, self._note)

    def _note(self, number: int, _frame: object) -> None:
        if self.reason is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C twice, then a third: the user won't wait
        self.ask(signal.Signals(number).name)

    def _note_usr2(self, number: int, _frame: object) -> None:
        if current_launch() is None:
            self.ask(signal.Signals(number).name)
        else:
            self.regroup = True

    def ask(self, reason: str) -> None:
        """Note a request; the first one counts."""
        if self.reason is None:
            self.since = time.monotonic()
            self.reason = reason

    def watch(self, file: Path) -> None:
        """Take the file's appearance as a request too; its text is the reason."""
        self._file = file

    def _read_file(self, file: Path) -> None:
        """Take note of the stop file. An empty one may be about to be written: it counts when it is a second old."""
        try:
            text = read_note(file).strip()
            if text or time.time() - file.stat().st_mtime > 1:
                self.ask(text[:200] or "stop file")
        except (PermissionError, IsADirectoryError, UnicodeDecodeError):
            self.ask("stop file")
        except OSError:  # none, or a file system that is away
            pass

    def __bool__(self) -> bool:
        if self.reason is None and self._file is not None:
            self._read_file(self._file)
        return self.reason is not None

    def seconds(self) -> float:
        """Seconds since the request."""
        return time.monotonic() - self.since if self.reason is not None else 0.0


def die_with_torchrun() -> None:
    """Under torchrun: be killed when torchrun is, instead of training on as an orphan beside the next start (Linux).
    The process is called `rank N`, for ps -c, top and pkill."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    library.prctl(_PR_SET_NAME, f"rank {os.environ.get('RANK', '')}".encode(), 0, 0, 0)


def interrupted_exit_code() -> int:
    """What an interrupted process exits with: under torchrun 0, since it takes anything else for a crash."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and current_launch() is None
    return EXIT_OK if under_torchrun else EXIT_INTERRUPTED
