"""Progress of long work: a bar on a terminal, a plain line every 30 s in a log file. Writes to stderr."""

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them: '2 d 3 h', '3 h 05 min', '4 min 12 s', '9 s'; '?' for None."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def can_redraw(stream: TextIO) -> bool:
    """Is it a terminal that can show something again in its place? On a dumb one (Emacs's shell, some builders) a bar
    would say nothing until its end."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Progress:
    """Counts towards `total` (None: unknown) in `unit`; "bytes" is shown in MB and MB/s.

    Use as a context manager; `advance` is not thread-safe.
    """

    LINE_EVERY_S = 30.0

    def __init__(self, title: str, total: int | None, unit: str = "items", quiet: bool = False) -> None:
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self.count = 0
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if not self.quiet and can_redraw(sys.stderr):
            self._bar = self._make_bar()
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def _make_bar(self) -> "Bar":
        from rich import progress
        from rich.console import Console

        counts: list[progress.ProgressColumn]
        if self.unit == "bytes":
            counts = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
        else:
            counts = [progress.MofNCompleteColumn(), progress.TextColumn(self.unit)]
        columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), *counts]
        columns.append(progress.TimeRemainingColumn())
        return progress.Progress(*columns, console=Console(stderr=True), transient=False)

    def advance(self, amount: int = 1) -> None:
        self.count += amount
        if self._bar is not None:
            self._bar.advance(self._task, amount)
        elif not self.quiet and time.monotonic() - self._last_line >= self.LINE_EVERY_S:
            self._last_line = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """One plain line: done, total, rate, and the time left where the total is known."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = self.count / elapsed
        scale, unit = (1e6, "MB") if self.unit == "bytes" else (1, self.unit)
        done = f"{self.count / scale:,.0f}"
        if self.total:
            left = (self.total - self.count) / rate if rate else float("inf")
            done += f" of {self.total / scale:,.0f} {unit} ({100 * self.count / self.total:.0f} %)"
            tail = f", {duration(left)} left" if left != float("inf") else ""
        else:
            done, tail = f"{done} {unit}", ""
        return f"{self.title}: {done}, {rate / scale:,.1f} {unit}/s{tail}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self.quiet and kind is None:
            print(self.line(), file=sys.stderr, flush=True)
