"""Training samples that turned out unreadable, and were substituted; all ranks know the same ones."""

from collections.abc import Mapping

import numpy as np


class Unreadable:
    """Notes a sample where the ids of all ranks' batches, which each rank is told, differ from those planned.

    Args:
        blacklist: sample -> the step in which it was found; a checkpoint's.
    """

    def __init__(self, blacklist: Mapping[int, int]):
        self._found = dict(blacklist)

    def observe(self, step: int, planned: np.ndarray, ids: np.ndarray) -> list[int]:
        """Take note of the samples planned for a step and those that were read. Returns the new unreadable ones."""
        new = [sample for sample in planned[planned != ids].tolist() if sample not in self._found]
        self._found |= dict.fromkeys(new, step)
        return new

    def skip(self, epoch_start: int | None = None) -> frozenset[int]:
        """The samples not to be read: those found up to the step at which the epoch starts; None: all."""
        return frozenset(i for i, step in self._found.items() if epoch_start is None or step <= epoch_start)

    def state(self) -> dict[str, list[list[int]]]:
        """For a checkpoint's manifest."""
        return {"blacklist": [list(item) for item in sorted(self._found.items())]}
