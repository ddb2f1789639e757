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


def _from_corner(window: torch.Tensor, left: int, top: int) -> torch.Tensor:
    """The upper left part of an image, uint8 [top + h, left + w, 3], of which only the window [h, w, 3] has its pixels;
    good until this thread's next one.

    So a pixel of the output lies where a pixel of the whole image, resized, lies. The others are not looked at: a
    window of which only a region is resized has a margin as wide as the filter reaches (`EvalPlan`).
    """
    if not left and not top:
        return window
    height, width, channels = window.shape
    shape = top + height, left + width, channels
    size = math.prod(shape)
    memory = getattr(_scratch, "memory", None)
    if memory is None or len(memory) < size:
        memory = _scratch.memory = torch.empty(size, dtype=window.dtype)
    image = memory[:size].view(shape)
    image[top:, left:] = window
    return image


class Windows(Protocol):
    """The planned windows of a batch, decoded: arrays or tensors uint8 [h, w, 3]."""

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


def _has_ties(factor: float) -> bool:
    """Is 1 / factor a fraction with a denominator of 16 at most? Then many sums lie halfway between two levels, and
    where both passes round another way than PIL's a pixel is off by two. In floating point, rounded once, none is off
    by more than one."""
    return any(abs(number / factor - round(number / factor)) < 1e-6 for number in range(1, 17))


class Resizer:
    """Resizes batches of windows to the planned size with `threads` threads, "bilinear" or "bicubic"."""

    def __init__(self, threads: int, interpolation: str = "bilinear"):
        self._resize, self._resize_into = _RESIZE[interpolation].default, _RESIZE[interpolation].out
        self.is_bicubic = interpolation == "bicubic"
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def start(self, windows: Windows, planned: Planned) -> Resizing:
        """Begin with a batch. A window is taken by the thread that resizes it."""
        count, size = len(windows), planned.size
        with torch.inference_mode(False):  # other threads fill it, and inference mode is a thread's own
            images = torch.empty((count, size, size, 3), dtype=torch.uint8)
        part, flips = _is_part(planned).tolist(), planned.flips.tolist()
        corners = planned.windows[:, :2]
        regions = planned.rois + np.tile(corners, 2)  # from the image's corner

        def work(first: int, last: int) -> None:
            for i in range(first, last):
                window = windows[i]
                if not isinstance(window, torch.Tensor):
                    window = torch.from_numpy(np.asarray(window))
                image = images[i]
                if part[i]:
                    image.copy_(self._cut_out(_from_corner(window, *corners[i].tolist()), regions[i], size))
                else:
                    self._whole(window, image)
                if flips[i]:
                    image.copy_(image.flip(1))

        firsts = range(0, count, _AT_ONCE)
        return Resizing(images, [self.pool.submit(work, i, min(i + _AT_ONCE, count)) for i in firsts])

    def _whole(self, window: torch.Tensor, image: torch.Tensor) -> None:
        """Fill `image` [size, size, 3] with a window [h, w, 3]."""
        planes, size = window.contiguous()[None].permute(0, 3, 1, 2), image.shape[:2]  # channels_last: the fast kernel
        self._resize_into(planes, size, False, None, None, out=image[None].permute(0, 3, 1, 2))

    def _cut_out(self, window: torch.Tensor, region: np.ndarray, size: int) -> torch.Tensor:
        """The region (left, top, right, bottom) of an image, of which `window` is the upper left part, resized.

        The region begins at a whole pixel of the resized image (`EvalPlan`).
        """
        factor_x, factor_y = (size / (region[2:] - region[:2])).tolist()
        left, top = round(region[0] * factor_x), round(region[1] * factor_y)
        planes = window[None].permute(0, 3, 1, 2)
        rows, columns = top + size, left + size
        rows += rows == window.shape[0] and factor_y != 1  # torch takes as many out as in for nothing to do
        columns += columns == window.shape[1] and factor_x != 1
        if not (self.is_bicubic or _has_ties(factor_x) or _has_ties(factor_y)):
            whole = self._resize(planes, [rows, columns], False, factor_y, factor_x)[..., left : left + size]
        else:
            exact = planes.to(torch.float32, memory_format=torch.contiguous_format)
            if self.is_bicubic:  # which overshoots: PIL cuts to whole levels between the passes, too
                wide = self._resize(exact, [window.shape[0], columns], False, 1, factor_x)[..., left : left + size]
                exact = self._resize(wide.round_().clamp_(0, 255), [rows, size], False, factor_y, 1)
            else:  # rounded once
                exact = self._resize(exact, [rows, columns], False, factor_y, factor_x)[..., left : left + size]
            exact = exact[:, :, top : top + size]
            return exact[0].round_().clamp_(0, 255).byte().permute(1, 2, 0)
        return whole[0, :, top : top + size].permute(1, 2, 0)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
