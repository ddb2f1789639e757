"""Batches copied to a CUDA device ahead of the step, on a stream of their own."""

import dataclasses
from collections.abc import Generator, Iterator
from typing import Any

import torch


def prefetch_to_device(batches: Generator[Any], device: torch.device) -> Generator[Any]:
    """The same batches: the next one is copied to `device` while the step of the current one runs.

    `batches` copies asynchronously on the current stream; here that is a stream other than the training's.
    """
    stream = torch.cuda.Stream(device)

    def bring() -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            event = torch.cuda.Event()
            event.record()
        return batch, event

    try:
        batch, event = bring()
        while batch is not None:
            following = bring()
            training = torch.cuda.current_stream(device)
            training.wait_event(event)
            for tensor in _tensors(batch):
                tensor.record_stream(training)  # its memory is not reused before the step has read it
            yield batch
            batch, event = following
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
