"""The plan: which samples a step sees, their crop windows and flips, as a pure function of (seed, step).

NumPy only. Nothing here is carried from step to step, so any step can be asked for at once, by any rank of any world.
The samples of all epochs form one endless sequence, an epoch's permutation after another; step s takes the
`global_batch_size` positions from s * global_batch_size on. So every sample comes exactly once an epoch, none is
dropped or repeated, and a batch at an epoch's border holds the last samples of one epoch and the first of the next.

The random numbers are splitmix64 (Steele, Lea, Flood 2014) over a counter of (seed, epoch, sample, draw): they follow
the sample to whatever rank reads it, and do not depend on NumPy's version.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import xxhash

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ORDER, _CROP, _FLIP, _SUBSTITUTE, _AGAIN = (np.uint64(i) for i in range(1, 6))  # independent streams of one seed
_TRIES = 10  # of RandomResizedCrop before it falls back to the middle, as in torchvision


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: uint64 -> uint64, a bijection that mixes every bit."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_counter(*parts) -> np.ndarray:
    """uint64 hash of the parts, each an integer or an array of them (broadcast together)."""
    key = np.uint64(0)
    for part in parts:
        key = splitmix64(key ^ np.asarray(part).astype(np.uint64))
    return key


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 of 64 random bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Planned:
    """What is to be cut from B samples.

    ids, epochs: int64 [B]. windows: int32 [B, 4], the part of the stored image to decode (left, top, width, height).
    rois: float64 [B, 4], the part of that window (left, top, right, bottom) which is resized to the output.
    flips: bool [B].
    """

    ids: np.ndarray
    epochs: np.ndarray
    windows: np.ndarray
    rois: np.ndarray
    flips: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, position: int) -> "Planned":
        """The plan of one sample of the batch, as a batch."""
        here = slice(position, position + 1)
        return Planned(self.ids[here], self.epochs[here], self.windows[here], self.rois[here], self.flips[here])


def batch_digest(ids: np.ndarray, windows: np.ndarray, flips: np.ndarray) -> str:
    """xxh3_64 (hex) of a global batch: ids as int64, then windows as int32, then flips as uint8, little-endian."""
    state = xxhash.xxh3_64()
    for array, dtype in ((ids, "<i8"), (windows, "<i4"), (flips, "u1")):
        state.update(np.ascontiguousarray(array, dtype).data)
    return state.hexdigest()


def random_resized_windows(
    bits: np.ndarray, widths: np.ndarray, heights: np.ndarray, area: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Windows int32 [B, 4] (left, top, width, height) with the distribution of torchvision's RandomResizedCrop.

    bits: uint64 [B], one hash a sample; widths, heights: pixels [B]; area, ratio: as in `DataConfig`.
    """
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    counters = np.arange(4 * _TRIES, dtype=np.uint64) * _GOLDEN
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


class TrainPlan:
    """The training samples of every step.

    Args:
        widths, heights: pixels of each stored image, [n].
        global_batch_size: images a step over all ranks.
        seed: 0 to 2^63 - 1.
        area, ratio: RandomResizedCrop's ranges. flip: probability.
    """

    def __init__(
        self,
        widths: np.ndarray,
        heights: np.ndarray,
        global_batch_size: int,
        seed: int,
        area: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ):
        self.widths, self.heights, self.seed = widths, heights, seed
        self.global_batch_size, self.area, self.ratio, self.flip = global_batch_size, area, ratio, flip
        self.samples = len(widths)
        self.reshuffle([])

    def reshuffle(self, steps: list[int]) -> None:
        """From each of these steps on, draw the rest of that epoch in another order; each sample still comes once."""
        self.reshuffled_from = list(steps)
        self.permutation = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of all samples in one epoch, int64 [n] (reached as `permutation`, which keeps two)."""
        keys = hash_counter(self.seed, _ORDER, epoch, np.arange(self.samples))
        order = np.argsort(keys, kind="stable")
        for number, step in enumerate(self.reshuffled_from):
            place = step * self.global_batch_size - epoch * self.samples
            if 0 <= place < self.samples:
                rest = order[place:]
                order[place:] = rest[np.argsort(hash_counter(self.seed, _AGAIN, number, rest), kind="stable")]
        return order

    def epoch_end(self, epoch: int) -> int:
        """The number of steps after which `epoch` epochs (0: none) have been seen in full."""
        return -(-epoch * self.samples // self.global_batch_size)

    def epochs_done(self, step: int) -> int:
        """How many epochs have been seen in full after `step` steps."""
        return step * self.global_batch_size // self.samples

    def steps(self, epochs: float) -> int:
        """The number of steps of so many epochs, to the nearest whole step, at least one."""
        return max(1, round(epochs * self.samples / self.global_batch_size))

    def positions(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, epochs), int64 [stop - start], of positions start..stop-1 of the global batch of `step`."""
        positions = step * self.global_batch_size + np.arange(start, stop)
        epochs, places = np.divmod(positions, self.samples)
        ids = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self.permutation(int(epoch))[places[here]]
        return ids, epochs

    def cut(self, ids: np.ndarray, epochs: np.ndarray) -> Planned:
        """Windows and flips of these samples in these epochs: a hash of (seed, epoch, id)."""
        windows = random_resized_windows(
            hash_counter(self.seed, _CROP, epochs, ids), self.widths[ids], self.heights[ids], self.area, self.ratio
        )
        flips = uniform(hash_counter(self.seed, _FLIP, epochs, ids)) < self.flip
        rois = np.zeros((len(ids), 4))
        rois[:, 2:] = windows[:, 2:]
        return Planned(ids, epochs, windows, rois, flips)

    def local(self, step: int, rank: int = 0, world_size: int = 1) -> Planned:
        """What `rank` of `world_size` sees in `step`: its slice of the global batch."""
        size = self.global_batch_size // world_size
        return self.cut(*self.positions(step, rank * size, (rank + 1) * size))

    def digest(self, step: int, ids: np.ndarray) -> str:
        """`batch_digest` of the global batch of `step` whose ids, in order, were `ids` (after substitution)."""
        _, epochs = self.positions(step, 0, self.global_batch_size)
        planned = self.cut(ids, epochs)
        return batch_digest(planned.ids, planned.windows, planned.flips)

    def substitute(self, sample: int, attempt: int) -> int:
        """The sample that stands in for an unreadable one; attempt 0, 1, ... until one is readable."""
        return int(hash_counter(self.seed, _SUBSTITUTE, sample, attempt) % np.uint64(self.samples))


class EvalPlan:
    """The validation samples: each exactly once over all ranks, resized and cropped from the middle.

    Geometry of torchvision's Resize(resize) and CenterCrop(size): the shorter side becomes `resize` pixels, the longer
    int(resize * longer / shorter), the crop's corner is rounded half to even. It is given as a region of the stored
    image, with a margin as wide as the antialiasing filter reaches.
    """

    def __init__(self, widths: np.ndarray, heights: np.ndarray, batch_size: int, resize: int, size: int):
        self.widths, self.heights = widths, heights
        self.batch_size, self.resize, self.size = batch_size, resize, size
        self.samples = len(widths)

    def steps(self, world_size: int) -> int:
        """Batches that the rank with the most samples needs; a rank that is done earlier gets empty ones."""
        most = math.ceil(self.samples / world_size)
        return math.ceil(most / self.batch_size)

    def corners(self, room_x: np.ndarray, room_y: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Left and top of the crops in the resized images, which are so many pixels larger than the crop."""
        return np.rint(room_x / 2), np.rint(room_y / 2)

    def cut(self, ids: np.ndarray, epochs: np.ndarray) -> Planned:
        """The middle of these samples; `epochs` is only passed through."""
        w, h = self.widths[ids].astype(np.int64), self.heights[ids].astype(np.int64)
        short = np.minimum(w, h)
        new_w, new_h = (self.resize * w // short), (self.resize * h // short)
        left, top = self.corners(new_w - self.size, new_h - self.size, epochs)
        scale_x, scale_y = w / new_w, h / new_h
        x0, y0 = left * scale_x, top * scale_y
        x1, y1 = x0 + self.size * scale_x, y0 + self.size * scale_y
        reach_x, reach_y = np.ceil(np.maximum(scale_x, 1)) + 1, np.ceil(np.maximum(scale_y, 1)) + 1
        wx0, wy0 = np.maximum(np.floor(x0 - reach_x), 0), np.maximum(np.floor(y0 - reach_y), 0)
        wx1, wy1 = np.minimum(np.ceil(x1 + reach_x), w), np.minimum(np.ceil(y1 + reach_y), h)
        windows = np.stack([wx0, wy0, wx1 - wx0, wy1 - wy0], 1).astype(np.int32)
        rois = np.stack([x0 - wx0, y0 - wy0, x1 - wx0, y1 - wy0], 1)
        return Planned(ids, epochs, windows, rois, np.zeros(len(ids), bool))

    def local(self, step: int, rank: int = 0, world_size: int = 1) -> Planned:
        """What `rank` of `world_size` scores in batch `step`; empty when its share is done."""
        first, last = self.samples * rank // world_size, self.samples * (rank + 1) // world_size
        start = min(first + step * self.batch_size, last)
        ids = np.arange(start, min(start + self.batch_size, last), dtype=np.int64)
        return self.cut(ids, np.zeros_like(ids))


class FiveCropPlan(EvalPlan):
    """Each validation sample five times in a row: cropped from the middle and from the four corners (Krizhevsky et al.
    2012, section 4.1). The crop's number takes the place of `epochs`. batch_size: in crops, a multiple of five."""

    CROPS = 5

    def steps(self, world_size: int) -> int:
        return math.ceil(math.ceil(self.samples / world_size) / (self.batch_size // self.CROPS))

    def corners(self, room_x: np.ndarray, room_y: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        middle_x, middle_y = super().corners(room_x, room_y, epochs)
        left = np.where(epochs == 0, middle_x, np.where(epochs % 2 == 1, 0, room_x))
        top = np.where(epochs == 0, middle_y, np.where(epochs <= 2, 0, room_y))
        return left, top

    def local(self, step: int, rank: int = 0, world_size: int = 1) -> Planned:
        first, last = self.samples * rank // world_size, self.samples * (rank + 1) // world_size
        many = self.batch_size // self.CROPS
        start = min(first + step * many, last)
        ids = np.arange(start, min(start + many, last), dtype=np.int64)
        return self.cut(np.repeat(ids, self.CROPS), np.tile(np.arange(self.CROPS), len(ids)))
