"""Who reads a batch: the thread that asks for it, and others while batches are late.

Files that are in memory one thread reads quicker than several, which would mostly wait for the GIL; other files several
threads read quicker.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

_HURRIED = 16  # batches that all threads read once one was late
T = TypeVar("T")


@dataclass
class _Reading:
    """A batch under way. take: reads its samples until none is left. helpers: threads that do so beside the caller."""

    take: Callable[[], None]
    helpers: list[Future]


class ReadingThreads:
    """count: files that are read at once where batches are late."""

    def __init__(self, count: int):
        self.count = count
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="read")
        self._lock = threading.Lock()
        self._readings: list[_Reading] = []
        self._hurried = 0  # batches that all threads are still to read

    def hurry(self, more: bool) -> None:
        """Somebody waits for a batch: all threads read it, under way or the next to begin. more: and some to come."""
        with self._lock:
            coming = _HURRIED if more else 0 if self._readings else 1
            self._hurried = max(self._hurried, coming)
            for reading in self._readings:
                self._help(reading)

    def _help(self, reading: _Reading) -> None:
        while len(reading.helpers) < self.count - 1:
            reading.helpers.append(self.pool.submit(reading.take))

    def read_each(self, read: Callable[[int], T], count: int) -> list[T]:
        """What `read` returns for 0 to count - 1, each called by one thread. What it raises ends the batch."""
        found: dict[int, T] = {}
        left = iter(range(count))

        def take() -> None:
            for i in left:
                found[i] = read(i)

        reading = _Reading(take, [])
        try:
            with self._lock:
                self._readings.append(reading)
                if self._hurried:
                    self._hurried -= 1
                    self._help(reading)
            take()
        finally:
            with self._lock:
                self._readings.remove(reading)
        for helper in reading.helpers:
            helper.result()
        return [found[i] for i in range(count)]

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
