"""Waits between tries over a network: how long, how often, and when to give up."""

import random
import sys
import threading
import time
from dataclasses import dataclass

from pipeline.errors import TransientError

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0
MESSAGE_AFTER_S, MESSAGE_EVERY_S = 10.0, 60.0  #: waits that the user gets a message about


@dataclass(frozen=True)
class Patience:
    """Seconds: without data, until a connection is dropped; without any progress, until the command stops."""

    stall_s: float = 30.0
    give_up_s: float = 900.0


def parse_retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header (a number or an HTTP date); None where there is none, or one that asks for no
    wait: 0, or a date that is past by this machine's clock."""
    if not value:
        return None
    from email.utils import parsedate_to_datetime

    try:
        number = value.strip().isdecimal()
        seconds = float(value) if number else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return seconds if seconds > 0 else None


class Backoff:
    """Waits between tries: doubling, with jitter, from 0.25 s to 30 s; gives up `give_up_s` after the last progress."""

    last_message_at = -60.0  #: time of the last message about a wait

    def __init__(self, patience: Patience, stop: threading.Event):
        self.patience, self.stop = patience, stop
        self.progressed()

    def progressed(self) -> None:
        self.tries, self.last = 0, time.monotonic()

    def wait(self, who: str, reason: str, asked_s: float | None = None) -> None:
        """Sleep before the next try. Raises TransientError when patience has run out, or on `stop`."""
        self.tries += 1
        wait = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(self.tries - 1, 10)) * random.uniform(0.75, 1.25)
        if asked_s is not None:
            wait = max(wait, asked_s) if asked_s else 0.0
        idle = time.monotonic() - self.last
        if idle + (asked_s or 0) > self.patience.give_up_s:
            asked = f" and asks to wait {asked_s:.0f} s" if asked_s else ""
            raise TransientError(
                f"{who}: {reason}{asked}; no progress for {idle:.0f} s; run the same command again to resume"
            )
        if asked_s is None:
            wait = min(wait, max(0.05, self.patience.give_up_s - idle))
        if idle + (asked_s or 0) > MESSAGE_AFTER_S and time.monotonic() - Backoff.last_message_at > MESSAGE_EVERY_S:
            Backoff.last_message_at = time.monotonic()
            when = f"again in {wait:.0f} s, as it asks" if asked_s else "again"
            print(f"{who}: {reason}; trying {when}", file=sys.stderr, flush=True)
        if self.stop.wait(wait):
            raise TransientError("stopped")
