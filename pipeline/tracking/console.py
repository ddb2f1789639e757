"""What a person sees: a bar on a terminal, plain lines in a log file. Rank 0 only; the others are silent."""

import sys
import time
from typing import TYPE_CHECKING

from pipeline.progress import duration
from pipeline.redact import redact

if TYPE_CHECKING:
    from rich.progress import Progress


class Console:
    """Progress of a run.

    Args:
        total_steps, first_step: where the bar ends and starts.
        every_s: seconds between plain lines.
        quiet: say nothing (ranks other than 0).
    """

    def __init__(self, every_s: float, quiet: bool = False):
        self.every_s, self.quiet = every_s, quiet
        self.bar: Progress | None = None
        self._last = -float("inf")

    def say(self, text: str) -> None:
        """Print one line."""
        if self.quiet:
            return
        text = redact(text)
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print one line that begins with "warning: "."""
        self.say(f"warning: {text}")

    def start(self, first_step: int, total_steps: int) -> None:
        """Begin to show steps."""
        self.total_steps = total_steps
        self._begun, self._first = time.monotonic(), first_step
        if self.quiet or not sys.stdout.isatty():
            return
        from rich import progress

        columns = [
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(),
        ]
        self.bar = progress.Progress(*columns)
        self.bar.start()
        self._task = self.bar.add_task("", total=total_steps, completed=first_step)

    def step(self, row: dict) -> None:
        """Show a step's ledger row; as a plain line only every `every_s` seconds, and the last."""
        if self.quiet:
            return
        text = f"epoch {row['epoch']:.2f}  loss {row['loss']:.3f}  {row['images_per_s']:.0f} images/s"
        if self.bar is not None:
            self.bar.update(self._task, completed=row["step"], description=text)
        elif time.monotonic() - self._last >= self.every_s or row["step"] == self.total_steps:
            self._last = time.monotonic()
            left = (self.total_steps - row["step"]) * (self._last - self._begun) / max(1, row["step"] - self._first)
            print(
                f"step {row['step']}/{self.total_steps}  {text}  lr {row['lr']:.4g}  "
                f"data wait {100 * row['data_wait_fraction']:.0f} %  {duration(left)} left",
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
