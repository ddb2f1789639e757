"""Decoding with PIL and torchvision's transforms: the reference for DALI's pixels, and the loader without DALI."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, crop, hflip, resized_crop
from torchvision.transforms.functional import resize as resize_image

from pipeline.dataset.index.pixels import open_image, to_rgb
from pipeline.loader.stream import EncodedBatch, UndecodableSample


def cut_window(
    image: Image.Image, window: np.ndarray, flip: bool, size: int, interpolation: str = "bilinear"
) -> Image.Image:
    """Training: crop, antialiased resize, flip."""
    left, top, width, height = (int(value) for value in window)
    image = resized_crop(image, top, left, height, width, [size, size], InterpolationMode(interpolation))
    return hflip(image) if flip else image


def decode_sample(
    data: np.ndarray,
    window: np.ndarray | None,
    flip: bool,
    size: int,
    resize: int | None,
    origin: np.ndarray | None = None,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """One sample by torchvision's PIL transforms, uint8 [size, size, 3]: the window resized, or (with `resize`, for
    validation) the shorter side resized and a crop cut out: the middle, or what begins at `origin` (x, y: in pixels of
    the stored image)."""
    with open_image(data.data) as opened:
        image = to_rgb(opened)
    if resize is None:
        assert window is not None
        image = cut_window(image, window, flip, size, interpolation)
    else:
        width, height = image.size
        image = resize_image(image, [resize], InterpolationMode(interpolation))
        if origin is None:
            image = center_crop(image, [size, size])
        else:
            left, top = round(origin[0] * image.size[0] / width), round(origin[1] * image.size[1] / height)
            image = crop(image, top, left, size, size)
    return np.asarray(image)


class ReferenceDecoder:
    """Decodes with `threads` threads (PIL releases the GIL while it decodes).

    Args:
        threads: decoding threads.
        prefetch: batches decoded ahead.
        resize: pixels of the shorter side before the middle is cut out (validation); None: the planned windows.
        interpolation: "bilinear" or "bicubic".

    The size of the output comes with each batch: images may grow from one to the next.
    """

    def __init__(self, threads: int, prefetch: int = 2, resize: int | None = None, interpolation: str = "bilinear"):
        self.prefetch, self.resize, self.interpolation = prefetch, resize, interpolation
        self.takes_parts = resize is None  # torchvision's validation transform resizes the whole image
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def prepare(self, data: np.ndarray) -> np.ndarray:
        """The bytes as they are: PIL is what all formats are judged by."""
        return data

    def rescue(self, data: np.ndarray) -> None:
        """There is no other way than PIL."""

    def _submit(self, encoded: EncodedBatch) -> tuple[EncodedBatch, list[Future]]:
        p = encoded.planned
        origins = p.windows[:, :2] + p.rois[:, :2]
        jobs = zip(encoded.data, encoded.windows(), p.flips.tolist(), origins, strict=True)
        return encoded, [
            self.pool.submit(decode_sample, data, window, flip, p.size, self.resize, origin, self.interpolation)
            for data, window, flip, origin in jobs
        ]

    def _collect(self, encoded: EncodedBatch, futures: list[Future]) -> torch.Tensor:
        size = encoded.planned.size
        images = np.empty((len(futures), size, size, 3), np.uint8)
        for i, future in enumerate(futures):
            try:
                images[i] = future.result()
            except (OSError, ValueError, SyntaxError) as error:
                raise UndecodableSample(encoded.step, i, f"{type(error).__name__}: {error}") from error
        return torch.from_numpy(images)

    def decode(self, batches: Iterable[EncodedBatch]) -> Iterator[torch.Tensor]:
        """Images uint8 [B, H, W, 3] of each batch, in order. Raises UndecodableSample."""
        pending: deque = deque()
        for encoded in batches:
            pending.append(self._submit(encoded))
            if len(pending) > self.prefetch:
                yield self._collect(*pending.popleft())
        while pending:
            yield self._collect(*pending.popleft())

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
