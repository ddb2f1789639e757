"""The plan: which samples a step sees, their crop windows and flips, as a pure function of (seed, step).

NumPy only. No state is carried from step to step, so any rank of any world size can compute any step directly.
The samples of all epochs form one endless sequence, an epoch's permutation after another; step s takes the
`global_batch_size` positions from s * global_batch_size on. So every sample comes exactly once an epoch, none is
dropped or repeated, and a batch at an epoch's border holds the last samples of one epoch and the first of the next.

The random numbers are a hash of (seed, epoch, sample, copy, draw): windows, flips, colors, geometry and erasing follow
the sample, whichever rank reads it. Mixing is a hash of (seed, step, group): its groups are consecutive positions of
the global batch that no rank splits, so a sample's partner is the same for any world size.

With repeated augmentation (Hoffer et al. 2020; Berman et al. 2019) a permutation lasts `repeats` epochs, and each of
its samples appears in it `repeats` times in a row. The number of positions and steps of an epoch does not change: it
holds one in `repeats` of the samples, each `repeats` times. After `repeats` epochs every sample was used exactly
`repeats` times. (The samplers of timm and DeiT draw each epoch's samples independently instead.) In a batch the first
copies of all its samples come first, then the second ones: copies of a sample lie far apart, mostly on other ranks,
and are not mixed with each other while a mixing group is no longer than a copy's share of the batch.

The digest of a batch is xxh3_64 over ids (int64), windows (int32) and flips (uint8) of the global batch, and then over
those that are present of: ops (uint8), amounts (float32), erased (int32), shifts (int32), blends (float32), boxes
(int32), shares (float32), and, where it changes over the run, the image's side (int32); little-endian, C order. An
augmentation that is off adds nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from pipeline.augment.params import AugmentParams, Mixing, sample_erase_boxes, sample_mixing
from pipeline.augment.policies import sample_ops
from pipeline.config import ResolvedDataConfig, TrainConfig
from pipeline.config.augment import UNAUGMENTED, AugmentConfig
from pipeline.dataset.index.index import Index
from pipeline.loader.permutations import Permutations
from pipeline.loader.windows import padded_windows, random_resized_windows, scale_jitter_windows
from pipeline.rng import hash_counter, uniform

_ORDER, _CROP, _FLIP, _SUBSTITUTE, _AGAIN, _POLICY, _JITTER, _ERASE, _MIX = (
    np.uint64(i) for i in range(1, 10)
)  # independent streams of one seed
MOST_SUBSTITUTES = 1000  #: that are tried for an unreadable sample
ORDER_AHEAD_STEPS = 50  #: before an epoch's border, when the next order is begun with: 0.13 s for 1.28 M samples


@dataclass(frozen=True)
class Planned:
    """The crop windows of B samples, and their augmentations.

    ids, epochs: int64 [B]. windows: int32 [B, 4], the part of the stored image to decode (left, top, width, height).
    rois: float64 [B, 4], the part of that window (left, top, right, bottom) which is resized to the output.
    flips: bool [B]. size: pixels of the output's side. copies: int64 [B], which of a sample's repetitions it is.
    augment_params, mixing: the other augmentations, None where there are none.
    """

    ids: np.ndarray
    epochs: np.ndarray
    windows: np.ndarray
    rois: np.ndarray
    flips: np.ndarray
    size: int
    copies: np.ndarray | None = None
    augment_params: AugmentParams | None = None
    mixing: Mixing | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, here: slice | list[int]) -> "Planned":
        """The samples at some positions of the batch, as a batch without other augmentations."""
        return Planned(
            self.ids[here], self.epochs[here], self.windows[here], self.rois[here], self.flips[here], self.size
        )


def batch_digest(
    ids: np.ndarray,
    windows: np.ndarray,
    flips: np.ndarray,
    augment_params: AugmentParams | None = None,
    mixing: Mixing | None = None,
    size: int | None = None,
) -> str:
    """The digest (hex) of a global batch; see the head of this file. size: where it changes over the run."""
    state = xxhash.xxh3_64()
    parts = [(ids, "<i8"), (windows, "<i4"), (flips, "u1")]
    if augment_params is not None:
        parts += augment_params.arrays()
    if mixing is not None:
        parts += mixing.arrays()
    if size is not None:
        parts.append((np.array([size]), "<i4"))
    for array, dtype in parts:
        state.update(np.ascontiguousarray(array, dtype).data)
    return state.hexdigest()


class TrainPlan:
    """The training samples of every step.

    Args:
        widths, heights: pixels of each stored image, [n].
        global_batch_size: images a step over all ranks.
        seed: 0 to 2^63 - 1.
        area, ratio: RandomResizedCrop's ranges. flip: probability.
        augment: the other augmentations.
        size_at: epoch -> pixels of the side of its images. sizes_change: whether that is not the same for all epochs.
        shorter_side: `scale_jitter_windows` instead of RandomResizedCrop.
        pad_crop: `padded_windows` instead of RandomResizedCrop.
        alternate_flips: each image is flipped every other time it is seen; `flip` is of no effect.
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
        augment: AugmentConfig = UNAUGMENTED,
        size_at: Callable[[int], int] = lambda epoch: 224,
        sizes_change: bool = False,
        shorter_side: tuple[int, int] | None = None,
        pad_crop: int | None = None,
        alternate_flips: bool = False,
    ):
        self.widths, self.heights, self.seed = widths, heights, seed
        self.global_batch_size, self.area, self.ratio, self.flip = global_batch_size, area, ratio, flip
        self.augment, self.size_at, self.sizes_change = augment, size_at, sizes_change
        self.shorter_side, self.pad_crop, self.alternate_flips = shorter_side, pad_crop, alternate_flips
        self.samples = len(widths)
        slots = np.arange(global_batch_size)  # of the batch, from the sequence: first copies first, then second ones
        self.layout = np.argsort(slots % augment.repeats, kind="stable")
        self.reshuffle([])

    def reshuffle(self, steps: list[int]) -> None:
        """Permute the rest of an epoch again from each of these steps on. Each sample still comes as often."""
        self.reshuffled_from = list(steps)
        self.permutation = Permutations(self._permutation)

    def _permutation(self, number: int) -> np.ndarray:
        """The order of all samples, int64 [n], in one epoch, or in so many epochs as a sample is repeated (reached as
        `permutation`, which keeps some)."""
        keys = hash_counter(self.seed, _ORDER, number, np.arange(self.samples))
        order = np.argsort(keys, kind="stable")
        for i, step in enumerate(self.reshuffled_from):
            start = step * self.global_batch_size - number * self.samples * self.augment.repeats
            start = -(-start // self.augment.repeats)
            if 0 <= start < self.samples:
                rest = order[start:]
                order[start:] = rest[np.argsort(hash_counter(self.seed, _AGAIN, i, rest), kind="stable")]
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

    def size(self, step: int) -> int:
        """Pixels of the side of the images of `step`: that of the epoch in which its first sample lies."""
        return self.size_at(self.epochs_done(step))

    def samples_at(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, epochs, copies), int64 [stop - start], of positions start..stop-1 of the global batch of `step`."""
        offsets = step * self.global_batch_size + self.layout[start:stop]  # in the endless sequence
        numbers, ranks = np.divmod(offsets, self.samples * self.augment.repeats)
        ranks, copies = np.divmod(ranks, self.augment.repeats)
        ids = np.empty(len(offsets), np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            ids[here] = self.permutation(int(number))[ranks[here]]
        return ids, offsets // self.samples, copies

    def _keys(self, stream: np.uint64, epochs: np.ndarray, ids: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """uint64 [B], a hash of seed, epoch, sample and, where there are several, copy."""
        keys = hash_counter(self.seed, stream, epochs, ids)
        return keys if self.augment.repeats == 1 else hash_counter(keys, copies)

    def _flips(self, epochs: np.ndarray, ids: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """bool [B]: is the image flipped? Alternating: a random half of the images is flipped the first time they are
        seen, the others the second time, and so on."""
        if not self.alternate_flips:
            return uniform(self._keys(_FLIP, epochs, ids, copies)) < self.flip
        repeats = self.augment.repeats
        seen_before = epochs // repeats * repeats + copies
        first = uniform(hash_counter(self.seed, _FLIP, ids)) < 0.5
        return first ^ (seen_before % 2 == 1)

    def cut(self, ids: np.ndarray, epochs: np.ndarray, copies: np.ndarray | None = None, size: int = 224) -> Planned:
        """Windows, flips and augmentations of these samples in these epochs: a hash of (seed, epoch, id, copy)."""
        copies = np.zeros_like(ids) if copies is None else copies
        sample = epochs, ids, copies
        images = self._keys(_CROP, *sample), self.widths[ids], self.heights[ids]
        shifts = None
        if self.pad_crop is not None:
            windows, shifts = padded_windows(*images, self.pad_crop, size)
        elif self.shorter_side is None:
            windows = random_resized_windows(*images, self.area, self.ratio)
        else:
            windows = scale_jitter_windows(*images, self.shorter_side, size)
        flips = self._flips(*sample)
        rois = np.zeros((len(ids), 4))
        rois[:, 2:] = windows[:, 2:]
        augment_params = None
        if self.augment.draws or shifts is not None:
            keys, jitter = self._keys(_POLICY, *sample), self._keys(_JITTER, *sample)
            ops, amounts = sample_ops(self.augment, keys, jitter, size) or (None, None)
            erase = self.augment.random_erase > 0
            augment_params = AugmentParams(
                ops,
                amounts,
                sample_erase_boxes(self.augment, self._keys(_ERASE, *sample), size) if erase else None,
                shifts,
            )
        return Planned(ids, epochs, windows, rois, flips, size, copies, augment_params)

    def with_ids(self, planned: Planned, ids: np.ndarray) -> Planned:
        """The same positions of the same batch with other samples in them (after substitution)."""
        return replace(self.cut(ids, planned.epochs, planned.copies, planned.size), mixing=planned.mixing)

    def _slice(self, step: int, start: int, stop: int, ids: np.ndarray | None = None) -> Planned:
        """Positions start..stop-1 of the global batch of `step`. ids: instead of the planned samples."""
        size = self.size(step)
        planned_ids, epochs, copies = self.samples_at(step, start, stop)
        planned = self.cut(planned_ids if ids is None else ids, epochs, copies, size)
        if not self.augment.mixes:
            return planned
        key = hash_counter(self.seed, _MIX, step)
        return replace(planned, mixing=sample_mixing(self.augment, key, start, stop, size))

    def prepare_order(self, step: int) -> None:
        """Begin with the order of the next epoch, in the background, where it is needed soon after `step`."""
        whole = self.samples * self.augment.repeats
        number = step * self.global_batch_size // whole
        if (step + ORDER_AHEAD_STEPS) * self.global_batch_size // whole > number:
            self.permutation.prepare(number + 1)

    def local(self, step: int, rank: int = 0, world_size: int = 1) -> Planned:
        """The slice of the global batch of `step` that belongs to `rank` of `world_size`."""
        size = self.global_batch_size // world_size
        return self._slice(step, rank * size, (rank + 1) * size)

    def digest(self, step: int, ids: np.ndarray) -> str:
        """`batch_digest` of the global batch of `step` whose ids, in order, were `ids` (after substitution)."""
        planned = self._slice(step, 0, self.global_batch_size, ids)
        size = planned.size if self.sizes_change else None
        return batch_digest(planned.ids, planned.windows, planned.flips, planned.augment_params, planned.mixing, size)

    def substitute(self, sample_id: int, attempt: int) -> int:
        """The sample that replaces an unreadable one; attempt 0, 1, ... until one is readable."""
        return int(hash_counter(self.seed, _SUBSTITUTE, sample_id, attempt) % np.uint64(self.samples))


def make_train_plan(
    index: Index, data: ResolvedDataConfig, train: TrainConfig, augment: AugmentConfig = UNAUGMENTED
) -> TrainPlan:
    """The plan of a run: a function of the index, the recipe and the seed alone. What `augment` changes beside the
    samples' order is for the reader of the batches to apply: see `make_train_stream`."""
    records = index.splits["train"].records
    widths, heights = (np.ascontiguousarray(records[key], np.int64) for key in ("width", "height"))
    return TrainPlan(
        widths,
        heights,
        train.global_batch_size,
        train.seed,
        data.crop_area,
        data.crop_ratio,
        data.flip,
        augment,
        data.size_at,
        sizes_change=len(data.sizes()) > 1,
        shorter_side=data.shorter_side,
        pad_crop=data.pad_crop,
        alternate_flips=data.alternate_flips,
    )
