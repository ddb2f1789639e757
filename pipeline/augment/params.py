"""The random parameters of a training batch besides its windows and flips: ops of each image, erasing, and mixing.

NumPy only. The first two follow from the sample, mixing from the step and the position in the global batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.config import AugmentConfig
from pipeline.rng import hash_counter, symmetric_beta, uniforms

_TRIES = 10  # of RandomErasing before it leaves the image as it is, as in torchvision


@dataclass(frozen=True)
class Mixing:
    """How B images are mixed, each with the one before it in its group (the first with the last).

    blends: float32 [B], an image's share of each pixel outside the box. boxes: int32 [B, 4] (left, top, width, height),
    what is taken from the partner. shares: float32 [B], the share of the image's own label.
    mixup has no box; CutMix has a blend of 1; an image that is not mixed has both.
    """

    blends: np.ndarray
    boxes: np.ndarray
    shares: np.ndarray

    def arrays(self) -> Iterator[tuple[np.ndarray, str]]:
        """Each array, and its type in the digest."""
        yield from ((self.blends, "<f4"), (self.boxes, "<i4"), (self.shares, "<f4"))


@dataclass(frozen=True)
class AugmentParams:
    """The augmentations of each of B images. ops: uint8 [B, S] (codes of `policies.OPS`), amounts: float32 [B, S];
    erased: int32 [B, 4] (left, top, width, height; width 0: nothing); shifts: int32 [B, 2], pixels to the right and
    down by which an image is moved before its ops. None: off."""

    ops: np.ndarray | None = None
    amounts: np.ndarray | None = None
    erased: np.ndarray | None = None
    shifts: np.ndarray | None = None

    def arrays(self) -> Iterator[tuple[np.ndarray, str]]:
        """Each array that is present, and its type in the digest."""
        all_arrays = (self.ops, "u1"), (self.amounts, "<f4"), (self.erased, "<i4"), (self.shifts, "<i4")
        for array, dtype in all_arrays:
            if array is not None:
                yield array, dtype


def sample_erase_boxes(c: AugmentConfig, keys: np.ndarray, size: int) -> np.ndarray:
    """Rectangles int32 [B, 4] (left, top, width, height), with the distribution of torchvision's RandomErasing (Zhong
    et al. 2020, arXiv 1708.04896); width 0: nothing is erased. keys: uint64 [B]; size: pixels of the image's side."""
    draws = uniforms(keys, 1 + 4 * _TRIES)
    wanted = draws[:, 0] < c.random_erase
    draws = draws[:, 1:].reshape(-1, _TRIES, 4)
    low, high = (math.log(value) for value in c.erase_ratio)
    area = (c.erase_area[0] + draws[..., 0] * (c.erase_area[1] - c.erase_area[0])) * size * size
    aspect = np.exp(low + draws[..., 1] * (high - low))
    h, w = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (h < size) & (w < size)
    rows, first = np.arange(len(keys)), fits.argmax(1)
    h, w = h[rows, first], w[rows, first]
    top, left = np.floor(draws[rows, first, 3] * (size - h + 1)), np.floor(draws[rows, first, 2] * (size - w + 1))
    boxes = np.stack([left, top, w, h], 1)
    return np.where((wanted & fits.any(1))[:, None], boxes, 0).astype(np.int32)


def sample_mixing(c: AugmentConfig, stream_key: np.ndarray, start: int, stop: int, size: int) -> Mixing:
    """The mixing of positions start..stop-1 of a global batch; both are multiples of `mix_group`.

    stream_key: uint64, a hash of seed and step. mixup: Zhang et al. 2018 (arXiv 1710.09412); CutMix: Yun et al. 2019
    (arXiv 1905.04899).
    """
    group = c.mix_group
    assert start % group == 0 and stop % group == 0, (start, stop, group)
    keys = hash_counter(stream_key, np.arange(start // group, stop // group))
    draws = uniforms(keys, 4)
    mixed = draws[:, 0] < c.mix_prob
    switch = c.mixup_switch_prob if c.mixup > 0 and c.cutmix > 0 else float(c.cutmix > 0)
    cut = mixed & (draws[:, 1] < switch)
    blends, shares, boxes = np.ones(len(keys)), np.ones(len(keys)), np.zeros((len(keys), 4), np.int64)
    if c.mixup > 0:
        plain = mixed & ~cut
        blends = np.where(plain, symmetric_beta(hash_counter(keys, 1), c.mixup), 1)
        shares = blends.copy()
    if c.cutmix > 0:
        half = np.sqrt(1 - symmetric_beta(hash_counter(keys, 2), c.cutmix)) / 2
        reach = np.floor(half * size).astype(np.int64)
        x, y = (np.floor(draws[:, i] * size).astype(np.int64) for i in (2, 3))
        left, top = np.maximum(x - reach, 0), np.maximum(y - reach, 0)
        found = np.stack([left, top, np.minimum(x + reach, size) - left, np.minimum(y + reach, size) - top], 1)
        boxes = np.where(cut[:, None], found, 0)
        shares = np.where(cut, 1 - found[:, 2] * found[:, 3] / (size * size), shares)
    each = (np.repeat(array, group, axis=0) for array in (blends, boxes, shares))
    return Mixing(*(array.astype(kind) for array, kind in zip(each, ("f4", "i4", "f4"), strict=True)))
