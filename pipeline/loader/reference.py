"""Decoding with PIL: no DALI needed. The pixels that DALI's are held to, and the loader for machines without it."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO

import numpy as np
import torch

from pipeline.loader.stream import Samples, UndecodableSample


def decode_sample(data: np.ndarray, window: np.ndarray, roi: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """One sample as torchvision's PIL transforms make it: crop, antialiased bilinear resize, flip; uint8 [H, W, 3]."""
    from PIL import Image

    left, top, width, height = (int(value) for value in window)
    with Image.open(BytesIO(data)) as image:
        image = image.convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=tuple(float(value) for value in roi))
    pixels = np.asarray(image)
    return pixels[:, ::-1] if flip else pixels


class ReferenceDecoder:
    """Decodes with `threads` threads (PIL lets go of the interpreter's lock while it decodes).

    Args:
        size: side of the output in pixels.
        prefetch: batches decoded ahead.
    """

    def __init__(self, size: int, threads: int, prefetch: int = 2):
        self.size, self.prefetch = size, prefetch
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def _submit(self, samples: Samples) -> tuple[Samples, list[Future]]:
        p = samples.planned
        jobs = zip(samples.data, p.windows, p.rois, p.flips, strict=True)
        return samples, [self.pool.submit(decode_sample, *job, self.size) for job in jobs]

    def _collect(self, samples: Samples, futures: list[Future]) -> torch.Tensor:
        images = np.empty((len(futures), self.size, self.size, 3), np.uint8)
        for i, future in enumerate(futures):
            try:
                images[i] = future.result()
            except (OSError, ValueError, SyntaxError) as error:
                raise UndecodableSample(samples.step, i, f"{type(error).__name__}: {error}") from error
        return torch.from_numpy(images)

    def decode(self, batches: Iterable[Samples]) -> Iterator[torch.Tensor]:
        """Images uint8 [B, H, W, 3] of each batch, in order. Raises UndecodableSample."""
        pending: deque = deque()
        for samples in batches:
            pending.append(self._submit(samples))
            if len(pending) > self.prefetch:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
