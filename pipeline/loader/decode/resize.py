"""Resizing of decoded windows on the CPU: torch's antialiased filters on bytes, several images at a time.

It is PIL's algorithm (two passes of fixed-point weights, rounded to bytes between them) with the processor's vector
instructions, a fifth of PIL's time. An image at a time: windows differ in size.
"""

import math
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.loader.plan import Planned

_AT_ONCE = 8  # images a task: some milliseconds
_RESIZE = {  # as torch.nn.functional.interpolate, which takes no factors
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
}


def _is_part(planned: Planned) -> np.ndarray:
    """bool [B]: is only a region of the window resized?"""
    return (planned.rois[:, :2] != 0).any(1) | (planned.rois[:, 2:] != planned.windows[:, 2:]).any(1)


_scratch = threading.local()  # memory that a thread uses for one image after the other


def _memory(name: str, *shape: int) -> np.ndarray:
    """uint8 of a shape; this thread's next call with the same name overwrites it."""
    size = math.prod(shape)
    memory = getattr(_scratch, name, None)
    if memory is None or len(memory) < size:
        memory = np.empty(size, np.uint8)
        setattr(_scratch, name, memory)
    return memory[:size].reshape(shape)


def _with_border(window: np.ndarray, left: int, top: int) -> np.ndarray:
    """A window [h, w, 3] as the lower right part of an image, uint8 [top + h, left + w, 3], whose other pixels are not
    set; good until this thread's next one.

    So a pixel of the output lies where a pixel of the whole image, resized, lies. The others are not looked at: a
    window of which only a region is resized has a margin as wide as the filter reaches (`EvalPlan`).
    """
    if not left and not top:
        return np.ascontiguousarray(window)
    height, width, channels = window.shape
    image = _memory("window", top + height, left + width, channels)
    image[top:, left:] = window
    return image


def _as_planes(image: np.ndarray) -> torch.Tensor:
    """uint8 [h, w, 3] as a tensor [1, 3, h, w] of the same memory, which torch knows as channels_last."""
    return torch.from_numpy(image[None].transpose(0, 3, 1, 2))


class Windows(Protocol):
    """The planned windows of a batch, decoded: what NumPy takes for an array uint8 [h, w, 3]."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Any: ...


@dataclass(frozen=True)
class Resizing:
    """A batch under way. images: uint8 [B, size, size, 3], whole once `result` returns it."""

    images: torch.Tensor
    tasks: list[Future]

    def result(self) -> torch.Tensor:
        for task in self.tasks:
            task.result()
        return self.images


def _denominator(factor: float) -> int:
    """Of 1 / factor, where it is a fraction with a denominator of 16 at most; else 0.

    Then many sums lie halfway between two levels. Where that is so on both axes and both passes round another way than
    PIL's, a pixel is off by two; in floating point, rounded once, by one at most.
    """
    return next((n for n in range(1, 17) if abs(n / factor - round(n / factor)) < 1e-6), 0)


@dataclass(frozen=True)
class _Axis:
    """How one axis of a region is resized.

    factor: output pixels a pixel. before: pixels of the frame before the window; the frame is what is resized. first:
    the first output pixel of the region in the resized frame. has_ties: see `_denominator`.
    """

    factor: float
    before: int
    first: int
    has_ties: bool

    @classmethod
    def of(cls, corner: int, start: float, stop: float, size: int) -> "_Axis":
        """corner: where the window begins in the image, pixels. start, stop: the region from there. size: of the
        output. The frame begins where a pixel of the resized image does: at the image's corner, or, where the factor is
        a simple fraction, as near to the window as that."""
        factor = size / (stop - start)
        q = _denominator(factor)
        left_out = int(corner * factor) // q * q if q else 0  # output pixels before the frame
        before = corner - round(left_out / factor)
        return cls(factor, before, round((start + corner) * factor) - left_out, q > 0)


def _start_pool(threads: int) -> ThreadPoolExecutor:
    """Threads that resize an image each: torch would divide one among several, which then wait for each other."""
    others = torch.get_num_threads()  # for threads that come later
    begun = threading.Barrier(threads + 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def begin() -> None:
        torch.get_num_threads()  # a thread's first use of torch takes the others' number
        torch.set_num_threads(1)
        begun.wait()

    try:
        for _ in range(threads):
            pool.submit(begin)
        begun.wait()
    except BaseException:  # a thread can't be started, or Ctrl-C: the others wait no longer
        begun.abort()
        pool.shutdown(wait=False)
        raise
    finally:
        torch.set_num_threads(others)
    return pool


class Resizer:
    """Resizes batches of windows to the planned size with `threads` threads, "bilinear" or "bicubic"."""

    def __init__(self, threads: int, interpolation: str = "bilinear"):
        self._resize, self._resize_into = _RESIZE[interpolation].default, _RESIZE[interpolation].out
        self.is_bicubic = interpolation == "bicubic"
        self.pool = _start_pool(threads)

    def start(self, windows: Windows, planned: Planned) -> Resizing:
        """Begin with a batch. A window is taken by the thread that resizes it."""
        count, size = len(windows), planned.size
        with torch.inference_mode(False):  # other threads fill it, and inference mode is a thread's own
            images = torch.empty((count, size, size, 3), dtype=torch.uint8, device="cpu")
        pixels = images.numpy()
        part, flips = _is_part(planned).tolist(), planned.flips.tolist()
        corners = planned.windows[:, :2].tolist()
        rois = planned.rois.tolist()

        # Each call of torch releases the GIL, and a thread that waits for it is woken each time: whatever NumPy can do
        # without releasing it is NumPy's.
        def work(first: int, last: int) -> None:
            for i in range(first, last):
                window, image = np.asarray(windows[i]), pixels[i]
                if part[i]:
                    image[:] = self._cut_out(window, corners[i], rois[i], size)
                else:
                    self._whole(window, image)
                if flips[i]:
                    image[:] = torch.from_numpy(image).flip(1).numpy()

        firsts = range(0, count, _AT_ONCE)
        return Resizing(images, [self.pool.submit(work, i, min(i + _AT_ONCE, count)) for i in firsts])

    def _whole(self, window: np.ndarray, image: np.ndarray) -> None:
        """Fill `image` [size, size, 3] with a window [h, w, 3]."""
        planes = _as_planes(np.ascontiguousarray(window))
        self._resize_into(planes, image.shape[:2], False, None, None, out=_as_planes(image))

    def _cut_out(self, window: np.ndarray, corner: list[int], region: list[float], size: int) -> np.ndarray:
        """A region (left, top, right, bottom) of a window, resized to uint8 [size, size, 3]; good until this thread's
        next one. corner: where the window begins in the image (left, top), pixels.

        The region begins at a whole pixel of the resized image (`EvalPlan`).
        """
        x = _Axis.of(corner[0], region[0], region[2], size)
        y = _Axis.of(corner[1], region[1], region[3], size)
        frame = _with_border(window, x.before, y.before)
        planes, (height, width) = _as_planes(frame), frame.shape[:2]
        rows, columns = y.first + size, x.first + size
        rows += rows == height and y.factor != 1  # torch takes as many out as in for nothing to do
        columns += columns == width and x.factor != 1
        across, down = slice(x.first, x.first + size), slice(y.first, y.first + size)
        if not self.is_bicubic and not (x.has_ties and y.has_ties):
            resized = _memory("resized", rows, columns, 3)  # into channels_last, as it comes, at half the time
            self._resize_into(planes, [rows, columns], False, y.factor, x.factor, out=_as_planes(resized))
            return resized[down, across]
        exact = planes.to(torch.float32, memory_format=torch.contiguous_format)
        if self.is_bicubic:  # which overshoots: PIL cuts to whole levels between the passes, too
            exact = self._resize(exact, [height, columns], False, 1, x.factor)[..., across].round_().clamp_(0, 255)
            exact = self._resize(exact, [rows, size], False, y.factor, 1)
        else:  # rounded once
            exact = self._resize(exact, [rows, columns], False, y.factor, x.factor)[..., across]
        return exact[0, :, down].round_().clamp_(0, 255).byte().permute(1, 2, 0).numpy()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
