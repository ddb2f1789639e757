"""What is made ready ahead of the step: batches on a CUDA device, batches beyond a pause, digests of global batches."""

import dataclasses
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipeline.loader.plan import TrainPlan


def prefetch_to_device(
    batches: Generator[Any], device: torch.device, then: Callable[[Any], Any] = lambda batch: batch
) -> Generator[Any]:
    """What `then` makes of each of the batches, handed over as soon as it is there. The next is fetched when it
    is asked for: by then the step of the current one is queued, and runs while it is copied.

    `batches` copies asynchronously on the current stream, and `then` computes on it; here that is a stream other
    than the training's.
    """
    stream = torch.cuda.Stream(device)
    try:
        while True:
            with torch.cuda.stream(stream):
                batch = next(batches, None)
                batch = None if batch is None else then(batch)
                event = torch.cuda.Event()
                event.record()
            if batch is None:
                return
            training = torch.cuda.current_stream(device)
            training.wait_event(event)
            for tensor in _tensors(batch):
                tensor.record_stream(training)  # its memory is not reused before the step has read it
            yield batch
    finally:
        batches.close()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor on a device in a batch, however deep."""
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            yield value
    elif dataclasses.is_dataclass(value):
        yield from _tensors(list(vars(value).values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class OngoingBatches:
    """A stream's batches, one range of steps after another. Where a range follows the last one, with the same samples
    left out, the loader has read on meanwhile: over an evaluation, a save, an epoch's border.

    Args:
        last_step: steps up to which it reads on.
    """

    def __init__(self, last_step: int):
        self.last_step = last_step
        self._batches: Generator[Any] | None = None
        self._asked: tuple[Any, int, frozenset[int]] | None = None  # stream, next step, samples left out
        self._stop = 0

    def read(self, stream: Any, start: int, stop: int, skip: frozenset[int]) -> Iterator[Any]:
        """The batches from step `start` on, at least up to `stop`."""
        if self._batches is None or self._asked != (stream, start, skip) or stop > self._stop:
            self.close()
            self._stop = max(stop, self.last_step)
            self._batches = stream.batches(start, self._stop, skip)
        self._asked = None  # after an error or Ctrl-C in here nothing can be read on
        for step, batch in enumerate(self._batches, start + 1):
            self._asked = stream, step, skip
            yield batch
            self._asked = None

    def close(self) -> None:
        """End reading ahead."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._asked = None


class DigestsAhead:
    """Digests of planned global batches, computed by a thread of their own while the step runs.

    Args:
        plan: of the run.
    """

    def __init__(self, plan: TrainPlan):
        self.plan = plan
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._begun: dict[int, Future[tuple[np.ndarray, str]]] = {}

    def start(self, step: int) -> None:
        """Begin with the batch of `step`."""
        self._begun[step] = self._pool.submit(self._planned, step)

    def _planned(self, step: int) -> tuple[np.ndarray, str]:
        planned, *_ = self.plan.samples_at(step, 0, self.plan.global_batch_size)
        return planned, self.plan.digest(step, planned)

    def take(self, step: int, ids: np.ndarray) -> str:
        """The digest of the batch of `step` whose ids, in order, were `ids` (after substitution)."""
        begun = self._begun.pop(step, None)
        if begun is not None:
            planned, digest = begun.result()
            if np.array_equal(planned, ids):
                return digest
        return self.plan.digest(step, ids)

    def clear(self) -> None:
        """Forget what was begun: the run went back, and its order may be another."""
        self._begun.clear()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
