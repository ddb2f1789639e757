"""Orders of all samples, computed once and in advance."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np


class Permutations:
    """Orders of all samples by number: each computed once, by whichever thread asks first, and the newest kept. One
    that failed is computed again for who asks next.

    Args:
        make: number -> int64 [n].
    """

    KEPT = 3  #: a batch at an epoch's border, and the order that is computed in advance

    def __init__(self, make: Callable[[int], np.ndarray]):
        self.make = make
        self._lock = threading.Lock()
        self._known: dict[int, Future[np.ndarray]] = {}  # the one asked for last comes last

    def __call__(self, number: int) -> np.ndarray:
        future, is_new = self._find(number)
        if is_new:
            self._compute(number, future)
        return future.result()

    def prepare(self, number: int) -> None:
        """Begin with an order that will be asked for, in a thread of its own."""
        future, is_new = self._find(number)
        if is_new:
            threading.Thread(target=self._compute, args=(number, future), name="order", daemon=True).start()

    def _find(self, number: int) -> tuple["Future[np.ndarray]", bool]:
        with self._lock:
            future = self._known.pop(number, None)
            self._known[number] = found = Future() if future is None else future
            while len(self._known) > self.KEPT:
                self._known.pop(next(iter(self._known)))
        return found, future is None

    def _compute(self, number: int, future: "Future[np.ndarray]") -> None:
        try:
            future.set_result(self.make(number))
        except BaseException as error:
            with self._lock:
                if self._known.get(number) is future:
                    del self._known[number]
            future.set_exception(error)
            raise
