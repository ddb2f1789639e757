"""The plan of an evaluation: each validation image once, its crop as a region of the stored image. NumPy only."""

import math

import numpy as np

from pipeline.loader.plan import Planned


class EvalPlan:
    """The validation samples: each exactly once over all ranks, resized and cropped from the middle.

    Geometry of torchvision's Resize(resize) and CenterCrop(size): the shorter side becomes `resize` pixels, the longer
    int(resize * longer / shorter), the crop's corner is rounded half to even. It is given as a region of the stored
    image, with a margin as wide as the antialiasing filter reaches: `support` pixels of the output (bilinear 1,
    bicubic 2).
    """

    def __init__(
        self, widths: np.ndarray, heights: np.ndarray, batch_size: int, resize: int, size: int, support: int = 1
    ):
        self.widths, self.heights, self.support = widths, heights, support
        self.batch_size, self.resize, self.size = batch_size, resize, size
        self.samples = len(widths)

    def steps(self, world_size: int) -> int:
        """Batches that the rank with the most samples needs; a rank that finishes earlier gets empty ones."""
        most = math.ceil(self.samples / world_size)
        return math.ceil(most / self.batch_size)

    def corners(self, room_x: np.ndarray, room_y: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Left and top of the crops in the resized images, which are so many pixels larger than the crop."""
        return np.rint(room_x / 2), np.rint(room_y / 2)

    def cut(self, ids: np.ndarray, epochs: np.ndarray) -> Planned:
        """The center crops of these samples; `epochs` is only passed through."""
        w, h = self.widths[ids].astype(np.int64), self.heights[ids].astype(np.int64)
        short = np.minimum(w, h)
        new_w, new_h = (self.resize * w // short), (self.resize * h // short)
        left, top = self.corners(new_w - self.size, new_h - self.size, epochs)
        scale_x, scale_y = w / new_w, h / new_h
        x0, y0 = left * scale_x, top * scale_y
        x1, y1 = x0 + self.size * scale_x, y0 + self.size * scale_y
        reach_x, reach_y = (np.ceil(self.support * np.maximum(scale, 1)) + 1 for scale in (scale_x, scale_y))
        wx0, wy0 = np.maximum(np.floor(x0 - reach_x), 0), np.maximum(np.floor(y0 - reach_y), 0)
        wx1, wy1 = np.minimum(np.ceil(x1 + reach_x), w), np.minimum(np.ceil(y1 + reach_y), h)
        windows = np.stack([wx0, wy0, wx1 - wx0, wy1 - wy0], 1).astype(np.int32)
        rois = np.stack([x0 - wx0, y0 - wy0, x1 - wx0, y1 - wy0], 1)
        return Planned(ids, epochs, windows, rois, np.zeros(len(ids), bool), self.size)

    def with_ids(self, planned: Planned, ids: np.ndarray) -> Planned:
        """The same crops of other samples."""
        return self.cut(ids, planned.epochs)

    def substitute(self, sample_id: int, attempt: int) -> int | None:
        """None: an unreadable sample is left out."""
        return None

    def prepare_order(self, step: int) -> None:
        """Nothing: the order is the data set's."""

    def local(self, step: int, rank: int = 0, world_size: int = 1) -> Planned:
        """Batch `step` of `rank` of `world_size`; empty when the rank has finished its share."""
        first, last = self.samples * rank // world_size, self.samples * (rank + 1) // world_size
        start = min(first + step * self.batch_size, last)
        ids = np.arange(start, min(start + self.batch_size, last), dtype=np.int64)
        return self.cut(ids, np.zeros_like(ids))

    def step_of(self, sample: int, rank: int = 0, world_size: int = 1) -> int:
        """The batch of `rank` that holds a sample of its share."""
        return (sample - self.samples * rank // world_size) // self._samples_of_a_batch()

    def _samples_of_a_batch(self) -> int:
        return self.batch_size


class FiveCropPlan(EvalPlan):
    """Each validation sample five times in a row: cropped from the middle and from the four corners (Krizhevsky et al.
    2012, section 4.1). The crop's number is passed as `epochs`. batch_size: in crops, a multiple of five."""

    CROPS = 5

    def steps(self, world_size: int) -> int:
        return math.ceil(math.ceil(self.samples / world_size) / self._samples_of_a_batch())

    def _samples_of_a_batch(self) -> int:
        return self.batch_size // self.CROPS

    def corners(self, room_x: np.ndarray, room_y: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        middle_x, middle_y = super().corners(room_x, room_y, epochs)
        left = np.where(epochs == 0, middle_x, np.where(epochs % 2 == 1, 0, room_x))
        top = np.where(epochs == 0, middle_y, np.where(epochs <= 2, 0, room_y))
        return left, top

    def local(self, step: int, rank: int = 0, world_size: int = 1) -> Planned:
        first, last = self.samples * rank // world_size, self.samples * (rank + 1) // world_size
        many = self._samples_of_a_batch()
        start = min(first + step * many, last)
        ids = np.arange(start, min(start + many, last), dtype=np.int64)
        return self.cut(np.repeat(ids, self.CROPS), np.tile(np.arange(self.CROPS), len(ids)))
