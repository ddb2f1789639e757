"""Which rank is slow: the time each spends on what it does alone, waiting for images and forward.

All ranks step together, so the time of a step says nothing about who was late. Backward is left out, as it ends when
the slowest rank's gradients have come; so is forward with SyncBatchNorm's exchange in it, in effect.
"""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

WINDOW = 50  # steps
LONGEST = 5  # of each rank's steps in a window, left out: a pause is no slowness
FACTOR, AT_LEAST_S = 1.3, 0.01  # above the median rank by this factor, and by so many seconds a step


class OwnTime:
    """Seconds of what is measured. On a GPU by its own clock, known a few steps later: where the host is ahead, its
    waiting for images costs the GPU nothing."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds = 0.0
        self.pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        if not self.on_gpu:
            begun = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - begun
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self.pending.append((begin, end))

    def take(self) -> float:
        """What came together since the last call; waits for nothing."""
        while self.pending and self.pending[0][1].query():
            begin, end = self.pending.popleft()
            self.seconds += begin.elapsed_time(end) / 1000
        seconds, self.seconds = self.seconds, 0.0
        return seconds


@dataclass(frozen=True)
class Slow:
    """A rank that is slow: seconds a step of its own, and the median rank's."""

    rank: int
    own_s: float
    median_s: float


class Stragglers:
    """Looks at `WINDOW` steps at a time. The same on all ranks.

    Args:
        size: ranks.
    """

    def __init__(self, size: int):
        self.times, self.steps = torch.zeros(WINDOW, size, dtype=torch.float64), 0
        self.known: int | None = None

    def observe(self, own_s: torch.Tensor) -> Slow | None:
        """Add a step. own_s: float64 [ranks]. Returns the slowest rank when it becomes a straggler."""
        self.times[self.steps] = own_s
        self.steps += 1
        if self.steps < WINDOW:
            return None
        mean, self.steps = self.times.sort(0).values[:-LONGEST].mean(0), 0
        slowest, median = int(mean.argmax()), mean.median().item()  # of two ranks the faster one
        excess = mean[slowest].item() - median
        if excess < AT_LEAST_S or mean[slowest] < FACTOR * median:
            self.known = None
            return None
        before, self.known = self.known, slowest
        return None if before == slowest else Slow(slowest, mean[slowest].item(), median)
