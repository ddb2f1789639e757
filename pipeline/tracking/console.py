"""What a person sees: lines of the logger `pipeline`, and on a terminal a bar. Rank 0 only; the others are silent."""

import sys
import time
from typing import TYPE_CHECKING

from pipeline.logs import command_line_handler, logger
from pipeline.progress import can_redraw, duration
from pipeline.tracking.eval_rows import scored_images
from pipeline.tracking.view import View

if TYPE_CHECKING:
    from rich.progress import Progress


class Console(View):
    """Progress of a run: a view of its ledger.

    Args:
        total_steps, first_step: where the bar ends and starts.
        every_s: seconds between plain lines.
        quiet: say nothing (ranks other than 0).
    """

    def __init__(self, every_s: float, quiet: bool = False):
        self.every_s, self.quiet = every_s, quiet
        self.bar: Progress | None = None
        self.total_steps = 0
        self._last = -float("inf")

    def say(self, text: str) -> None:
        """Log one line, at level INFO."""
        if not self.quiet:
            logger.info("%s", text)

    def alert(self, text: str) -> None:
        self.warn(text)

    def warn(self, text: str) -> None:
        """Log one line, at level WARNING."""
        if not self.quiet:
            logger.warning("%s", text)

    def start(self, first_step: int, total_steps: int) -> None:
        """Begin to show steps."""
        self.total_steps = total_steps
        self._begun, self._first = time.monotonic(), first_step
        handler = command_line_handler()
        if self.quiet or handler is None or not can_redraw(sys.stdout):
            return
        from rich import progress

        # one text, which a narrow terminal cuts at its end: of several columns rich drops the number of the step first
        columns = [progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TimeRemainingColumn()]
        self.bar = progress.Progress(*columns)
        self.bar.start()
        self._task = self.bar.add_task(f"step {first_step}/{total_steps}", total=total_steps, completed=first_step)
        handler.bar = self.bar

    def log(self, row: dict) -> None:
        """Show the scores of an evaluation; of a step its progress, as a plain line only every `every_s` seconds, and
        the last."""
        if self.quiet:
            return
        if row["kind"] == "eval":
            text = (
                f"validation loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %, top-5 {row['val_top5']:.2f} %"
            )
            if "val_ema_top1" in row:
                text += f", with averaged weights {row['val_ema_top1']:.2f} %"
            self.say(f"epoch {row['epoch']:.2f}, step {row['step']}: {text} of {scored_images(row)}")
            return
        text = f"step {row['step']}/{self.total_steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.3f}  "
        text += f"{row['images_per_s']:.0f} images/s"
        if self.bar is not None:
            self.bar.update(self._task, completed=row["step"], description=text)
        elif time.monotonic() - self._last >= self.every_s or row["step"] == self.total_steps:
            self._last = time.monotonic()
            left = (self.total_steps - row["step"]) * (self._last - self._begun) / max(1, row["step"] - self._first)
            self.say(
                f"{text}  lr {row['lr']:.4g}  data wait {100 * row['data_wait_fraction']:.0f} %  {duration(left)} left"
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            handler = command_line_handler()
            if handler is not None:
                handler.bar = None
            self.bar = None
