"""A run folder that can't be written for a while: what is said of it, and how long training continues."""

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import TransientError

SAY_AGAIN_AFTER_S = 60.0  # and again after twice as long


class Outage:
    """Follows what the disk says of each row.

    Args:
        folder: the run folder.
        wait_s: seconds that an outage may last.
        warn: prints a warning.
    """

    def __init__(self, folder: Path, wait_s: float, warn: Callable[[str], None]):
        self.folder, self.wait_s, self.warn = folder, wait_s, warn
        self._since: float | None = None
        self._say_at = 0.0

    def update(self, refusal: OSError | None, step: int) -> bool:
        """The disk refused the row of `step`, or (None) took it and all before it. True: an outage has just ended.
        Raises TransientError when it has lasted for too long."""
        now = time.monotonic()
        if refusal is None:
            if self._since is None:
                return False
            lasted, self._since = now - self._since, None
            self.warn(f"run folder {self.folder} can be written again after {lasted:.0f} s; no row is lost")
            return True
        if self._since is None:
            self._since, self._say_at = now, now
        reason = f"run folder {self.folder} can't be written ({refusal.strerror})"
        if now - self._since > self.wait_s:
            raise TransientError(
                f"step {step}: {reason} for {self.wait_s / 60:.3g} min now; fix that and run the same "
                "command to resume from the last checkpoint there"
            )
        if now >= self._say_at:
            left = (self.wait_s - now + self._since) / 60
            self.warn(
                f"step {step}: {reason}; training continues and keeps its rows in memory, no checkpoint is saved; "
                f"if that is not fixed in {left:.3g} min (--checkpoint.outage_timeout_minutes), "
                "the run ends with exit code 1"
            )
            self._say_at = now + max(SAY_AGAIN_AFTER_S, 2 * (now - self._since))
        return False
