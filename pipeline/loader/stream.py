"""A rank's batches of steps start..stop-1: plan and source joined, decoded, and whole in the face of bad samples.

In training an unreadable sample is replaced by a substitute that follows from (seed, sample) alone, so every rank and
every restart takes the same one. In validation it is left out and the batch is shorter: a substitute would falsify the
score.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.augment.apply import EraseAndMix, PixelOps, deliver
from pipeline.errors import TransientError
from pipeline.loader.plan import EvalPlan, Planned, TrainPlan
from pipeline.loader.prefetch import prefetch_to_device
from pipeline.loader.source import Source, UnreadableSample


@dataclass(frozen=True)
class Batch:
    """One step's local batch, on the step's device.

    images: uint8 [B, H, W, 3]. targets: int64 [B]. ids: int64 [B]. In validation B may be short, or 0. changes,
    erase_mix: what the step has yet to do to the images, None where nothing is.
    """

    images: torch.Tensor
    targets: torch.Tensor
    ids: torch.Tensor
    changes: PixelOps | None = None
    erase_mix: EraseAndMix | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class EncodedBatch:
    """What a decoder gets: the plan of a batch and, in the same order, each sample's bytes (uint8)."""

    step: int
    planned: Planned
    data: list[np.ndarray]

    def only(self, position: int) -> "EncodedBatch":
        """One sample of the batch, as a batch."""
        return EncodedBatch(self.step, self.planned.only(position), self.data[position : position + 1])


class UndecodableSample(Exception):
    """Raised by a decoder: position `position` of the batch of `step` can't be decoded."""

    def __init__(self, step: int, position: int, reason: str):
        super().__init__(f"step {step}, position {position}: {reason}")
        self.step, self.position, self.reason = step, position, reason


class Stream:
    """A rank's batches of one split.

    Args:
        plan: `TrainPlan` (substitutes) or `EvalPlan` (leaves out).
        source: bytes of the split's samples.
        decoder: `DaliDecoder` or `ReferenceDecoder`.
        labels: int [n].
        rank, world_size: this rank's slice of every batch.
        device: where batches are delivered.
        prefetch: batches read ahead.
        max_unreadable: distinct bad samples that are borne before TransientError.
    """

    def __init__(
        self,
        plan: TrainPlan | EvalPlan,
        source: Source,
        decoder,
        labels: np.ndarray,
        rank: int,
        world_size: int,
        device: torch.device,
        prefetch: int = 2,
        max_unreadable: int = 100,
    ):
        self.plan, self.source, self.decoder, self.device = plan, source, decoder, device
        self.labels = np.ascontiguousarray(labels, np.int64)
        self.rank, self.world_size, self.prefetch = rank, world_size, prefetch
        self.max_unreadable = max_unreadable
        self.unreadable: dict[int, str] = {}  # id -> reason: everything this rank has met
        self._pool = ThreadPoolExecutor(prefetch, thread_name_prefix="prepare")
        self._skip: frozenset[int] = frozenset()

    def _note(self, sample: int, reason: str) -> None:
        if sample not in self.unreadable:
            self.unreadable[sample] = reason
        if len(self.unreadable) > self.max_unreadable:
            raise TransientError(
                f"more than {self.max_unreadable} unreadable samples, the last one {self.source.describe(sample)} "
                f"({reason}); check the data with: pipeline verify ROOT"
            )

    def _stand_in(self, sample: int) -> tuple[int, np.ndarray]:
        """The first readable substitute of a bad sample, and its bytes."""
        for attempt in range(1000):
            candidate = self.plan.substitute(sample, attempt)
            if candidate in self._skip or candidate in self.unreadable:
                continue
            try:
                return candidate, self.source.read(candidate)
            except UnreadableSample as error:
                self._note(error.sample, error.reason)
        raise TransientError(
            f"no readable substitute for {self.source.describe(sample)}; check the data: pipeline verify ROOT"
        )

    def _mend(self, step: int, planned: Planned, data: list) -> EncodedBatch:
        """Replace (training) or leave out (validation) the samples whose place in `data` holds an exception."""
        bad = [i for i, item in enumerate(data) if isinstance(item, UnreadableSample)]
        if not bad:
            return EncodedBatch(step, planned, data)
        ids = planned.ids.copy()
        if isinstance(self.plan, EvalPlan):
            keep = np.setdiff1d(np.arange(len(ids)), bad)
            return EncodedBatch(step, self.plan.cut(ids[keep], planned.epochs[keep]), [data[i] for i in keep])
        for i in bad:
            ids[i], data[i] = self._stand_in(int(ids[i]))
        return EncodedBatch(step, self.plan.with_ids(planned, ids), data)

    def _prepare(self, step: int) -> EncodedBatch:
        planned = self.plan.local(step, self.rank, self.world_size)
        data = self.source.read_batch(planned.ids)
        for i, sample in enumerate(planned.ids):
            if int(sample) in self._skip:
                data[i] = UnreadableSample(int(sample), "on the blacklist")
            elif isinstance(data[i], UnreadableSample):
                self._note(int(sample), data[i].reason)
        return self._mend(step, planned, data)

    def batches(self, start: int, stop: int, skip: frozenset[int] = frozenset()) -> Iterator[Batch]:
        """The batches of steps start..stop-1. `skip`: samples known to be unreadable before `start`."""
        self._skip = skip
        batches = self._batches(start, stop)
        return prefetch_to_device(batches, self.device) if self.device.type == "cuda" else batches

    def _batches(self, start: int, stop: int) -> Iterator[Batch]:
        reading: dict[int, Future] = {}
        handed: dict[int, EncodedBatch] = {}  # with the decoder, not yet delivered; in order
        mended: dict[int, EncodedBatch] = {}  # to be handed again after a decoder gave up

        def feed(first: int) -> Iterator[EncodedBatch]:
            for step in range(first, stop):
                for coming in range(step, min(step + self.prefetch, stop)):
                    if coming not in reading and coming not in mended:
                        reading[coming] = self._pool.submit(self._prepare, coming)
                samples = mended.pop(step) if step in mended else reading.pop(step).result()
                if samples.data:
                    handed[step] = samples
                    yield samples

        position = start
        try:
            while position < stop:
                try:
                    for images in self.decoder.decode(feed(position)):
                        step = next(iter(handed))
                        position = step + 1
                        yield self._batch(images, handed.pop(step))
                    return
                except UndecodableSample as error:
                    handed[error.step] = self._without(handed[error.step], error)
                    mended.update(handed)
                    handed.clear()
                    position = error.step
        finally:
            for future in reading.values():
                future.cancel()

    def _without(self, samples: EncodedBatch, error: UndecodableSample) -> EncodedBatch:
        """A batch whose bytes are those indexed, but which a decoder refuses: mended."""
        sample = int(samples.planned.ids[error.position])
        self._note(sample, error.reason)
        data = list(samples.data)
        data[error.position] = UnreadableSample(sample, error.reason)
        return self._mend(samples.step, samples.planned, data)

    def _batch(self, images: torch.Tensor, samples: EncodedBatch) -> Batch:
        planned = samples.planned
        ids, targets = (deliver(array, self.device) for array in (planned.ids, self.labels[planned.ids]))
        changes = PixelOps.of(planned.drawn, planned.size, self.device)
        erase_mix = EraseAndMix.of(planned.drawn, planned.mixing, self.device)
        if self.device.type == "cuda" and not images.is_cuda:
            images = images.pin_memory().to(self.device, non_blocking=True)
        return Batch(images, targets, ids, changes, erase_mix)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.decoder.close()
        self.source.close()
