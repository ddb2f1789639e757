"""Signals and the stop file: how a run is asked to save and go. Installed before torch is imported; knows no torch.

A request is only noted here. It rides on the next step's report to all ranks, so that all stop at the same step,
whichever rank or node received it first.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import EXIT_INTERRUPTED, EXIT_OK, UserError
from pipeline.files import read_note
from pipeline.rank_env import adopt_srun_tasks, own_rank
from pipeline.training.ranks.launcher import current_launch

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # <sys/prctl.h>
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGXCPU)  # the last: of a limit of CPU time


HELD_BACK = (signal.SIGTERM, signal.SIGUSR2)  #: by `pipeline launch`, until a rank that starts has its handlers
#: The process that it forks ranks from does not end by these, which may go to a whole process group or job step: with
#: that process the ranks would end, unsaved.
OUTLIVED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGXCPU)

process_is_ours = False  #: set by a process whose whole life is one verb; see `StopRequest.restore_handlers`


def join_srun_tasks() -> None:
    """Several tasks of srun, without torchrun, become the ranks of one job. Raises UserError where they can't."""
    try:
        done = adopt_srun_tasks()
    except ValueError as error:
        raise UserError(str(error)) from error
    if done and own_rank() == 0:
        print(done, flush=True)


class StopRequest:
    """Has somebody asked this process to stop? `reason` and `since` (time.monotonic) say who and when.

    `regroup`: has `pipeline launch` asked it to save and stop because nodes joined? SIGUSR2, that is.
    """

    def __init__(self, install: bool = True):
        self.reason: str | None = None
        self.regroup = False
        self.since = 0.0
        self._file: Path | None = None
        self._seen: float | None = None  # when it was there for the first time
        self._before: dict[int, Any] = {}  # signal -> the handler that was there
        self._raises = False
        if install and threading.current_thread() is threading.main_thread():  # only that one may have handlers
            for number in _SIGNALS:
                self._install(number, self._on_signal)
            self._install(signal.SIGUSR2, self._on_usr2)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
                self._install(signal.SIGHUP, self._on_signal)
            if current_launch() is not None:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)  # what came meanwhile is noted now

    def _install(self, number: int, handler: Callable[[int, Any], None]) -> None:
        self._before[number] = signal.signal(number, handler)

    def restore_handlers(self) -> None:
        """Put back the handlers that were there before, for a program or notebook that called `main`. A process of our
        own keeps these to its end: a second signal must not kill it while it leaves."""
        if not process_is_ours:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _on_signal(self, number: int, _frame: object) -> None:
        first = self.reason is None
        self.ask(signal.Signals(number).name)
        if number == signal.SIGINT and own_rank() == 0:
            message = (
                "stopping; saving at the end of this step" if first else "saving; Ctrl-C once more ends it at once"
            )
            with contextlib.suppress(OSError):  # Ctrl-C has ended what reads it, such as tee
                os.write(2, f"\n{message}\n".encode())  # print is not for signal handlers
        if not first and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C twice, then a third: the user won't wait
        if self._raises:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """For work that keeps what is done by itself, and where there is nothing to save: a request ends it at once, by
        KeyboardInterrupt."""
        if self:
            raise KeyboardInterrupt
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _on_usr2(self, number: int, _frame: object) -> None:
        if current_launch() is None:
            self.ask(signal.Signals(number).name)
        else:
            self.regroup = True

    def ask(self, reason: str, age_s: float = 0.0) -> None:
        """Note a request, made so long ago; the first one counts."""
        if self.reason is None:
            self.since = time.monotonic() - age_s
            self.reason = reason

    def watch(self, file: Path) -> None:
        """Take the file's appearance as a request too; its text is the reason."""
        self._file = file

    def look(self) -> None:
        """Take note of the stop file, if it is there: the request is as old as the file. An empty one may be about to
        be written: it counts when it is a second old, or was seen a second ago, as its clock may be ahead."""
        if self.reason is not None or self._file is None:
            return
        age_s = 0.0
        try:
            age_s = max(0.0, time.time() - self._file.lstat().st_mtime)  # a link's text may be the note
            text = read_note(self._file).strip()
            now = time.monotonic()
            self._seen = now if self._seen is None else self._seen
            if text or max(age_s, now - self._seen) > 1:
                self.ask(text[:200] or "stop file", age_s)
        except (PermissionError, IsADirectoryError, UnicodeDecodeError):
            self.ask("stop file", age_s)
        except OSError:  # none, or a file system that is away
            self._seen = None

    def __bool__(self) -> bool:
        self.look()
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
