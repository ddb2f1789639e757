"""Crop windows of training images, drawn for many samples at once. NumPy only."""

import math

import numpy as np

from pipeline.rng import GOLDEN, splitmix64, uniform

_TRIES = 10  # of RandomResizedCrop before it falls back to the middle, as in torchvision


def random_resized_windows(
    bits: np.ndarray, widths: np.ndarray, heights: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Windows int32 [B, 4] (left, top, width, height) with the distribution of torchvision's RandomResizedCrop.

    bits: uint64 [B], one hash a sample; widths, heights: pixels [B]; area, ratio: as in `DataConfig`.
    """
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    counters = np.arange(4 * _TRIES, dtype=np.uint64) * GOLDEN
    draws = uniform(splitmix64(bits[:, None] + counters)).reshape(-1, _TRIES, 4)
    target = (area[0] + draws[..., 0] * (area[1] - area[0])) * (widths * heights)[:, None]
    aspect = np.exp(low + draws[..., 1] * (high - low))
    w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    rows, first = np.arange(len(bits)), fits.argmax(1)  # the first try that fits
    w, h = w[rows, first], h[rows, first]
    left = np.floor(draws[rows, first, 2] * (widths - w + 1)).astype(np.int64)
    top = np.floor(draws[rows, first, 3] * (heights - h + 1)).astype(np.int64)
    windows = np.stack([left, top, w, h], 1)
    open_ = np.flatnonzero(~fits.any(1))
    if not len(open_):
        return windows.astype(np.int32)
    w, h = widths[open_], heights[open_]  # the middle, as large as the ratio allows
    aspect = w / h
    w_new = np.where(aspect > ratio[1], np.rint(h * ratio[1]).astype(np.int64), w)
    h_new = np.where(aspect < ratio[0], np.rint(w / ratio[0]).astype(np.int64), h)
    windows[open_] = np.stack([(w - w_new) // 2, (h - h_new) // 2, w_new, h_new], 1)
    return windows.astype(np.int32)


def padded_windows(
    bits: np.ndarray, widths: np.ndarray, heights: np.ndarray, pad: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """A crop of `size` x `size` pixels at a uniform place of the image whose shorter side was resized to `size` and
    which was padded by `pad` pixels on every side (torchvision's Resize(size) and RandomCrop(size, padding=pad)).

    Returns windows int32 [B, 4] (left, top, width, height): the part of the stored image, to the nearest pixel, that
    becomes size x size pixels; and shifts int32 [B, 2] (right, down), by how many of these pixels it is then moved. A
    square image is resized as a whole.

    bits: uint64 [B], one hash a sample; widths, heights: pixels [B].
    """
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    draws = uniform(splitmix64(bits[:, None] + np.arange(2, dtype=np.uint64) * GOLDEN))
    short = np.minimum(widths, heights)
    windows, shifts = np.empty((len(bits), 4), np.int64), np.empty((len(bits), 2), np.int64)
    for axis, length in enumerate((widths, heights)):
        resized = size * length // short
        wanted = np.floor(draws[:, axis] * (resized - size + 2 * pad + 1)).astype(np.int64) - pad
        start = np.clip(wanted, 0, resized - size)
        shifts[:, axis] = start - wanted
        first, last = (np.rint(place * length / resized).astype(np.int64) for place in (start, start + size))
        windows[:, axis], windows[:, 2 + axis] = first, np.maximum(last - first, 1)
    return windows.astype(np.int32), shifts.astype(np.int32)


def scale_jitter_windows(
    bits: np.ndarray, widths: np.ndarray, heights: np.ndarray, shorter_side: tuple[int, int], size: int
) -> np.ndarray:
    """Windows int32 [B, 4] (left, top, width, height) of He et al. 2015, section 3.4 (after Simonyan and Zisserman
    2015): the shorter side becomes a whole number of pixels, uniform in `shorter_side` (both ends included), and `size`
    x `size` pixels are cropped at a uniform place. The window is that crop in the stored image, to the nearest pixel.

    bits: uint64 [B], one hash a sample; widths, heights: pixels [B].
    """
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    draws = uniform(splitmix64(bits[:, None] + np.arange(3, dtype=np.uint64) * GOLDEN))
    low, high = shorter_side
    side = low + np.floor(draws[:, 0] * (high - low + 1)).astype(np.int64)
    short = np.minimum(widths, heights)
    windows = np.empty((len(bits), 4), np.int64)
    for axis, length in enumerate((widths, heights)):
        resized = side * length // short
        start = np.floor(draws[:, 1 + axis] * (resized - size + 1))
        first = np.rint(start * length / resized).astype(np.int64)
        last = np.rint((start + size) * length / resized).astype(np.int64)
        windows[:, axis] = np.minimum(first, length - 1)
        windows[:, 2 + axis] = np.maximum(np.minimum(last, length) - windows[:, axis], 1)
    return windows.astype(np.int32)
