"""A rank's batches of steps start..stop-1: planned, read, decoded, and complete in spite of unreadable samples.

In training an unreadable sample is replaced by a substitute that follows from (seed, sample id) alone, so every rank
and every restart takes the same one. In validation it is left out and the batch is shorter: a substitute would falsify
the score.
"""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from pipeline.augment.apply import EraseAndMix, PixelOps, deliver
from pipeline.augment.ops import apply_ops
from pipeline.config import AugmentConfig
from pipeline.errors import TransientError
from pipeline.loader.eval_plan import EvalPlan
from pipeline.loader.plan import MOST_SUBSTITUTES, Planned, TrainPlan
from pipeline.loader.prefetch import prefetch_to_device
from pipeline.loader.source import Piece, Source, UnreadableSample


@dataclass(frozen=True)
class Batch:
    """One step's local batch, on the step's device.

    images: uint8 [B, H, W, 3]. targets: int64 [B]. ids: int64 [B]. In validation B may be short, or 0.
    pixel_ops, erase_mix: the augmentations that the step has to apply, None where there are none, or where they
    have been applied already.
    """

    images: torch.Tensor
    targets: torch.Tensor
    ids: torch.Tensor
    pixel_ops: PixelOps | None = None
    erase_mix: EraseAndMix | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def augmented(self, c: AugmentConfig) -> torch.Tensor:
        """uint8 [B, H, W, 3]: the images, with the pixel ops applied. c: the augmentation that they were drawn for."""
        return (
            self.images if self.pixel_ops is None else apply_ops(self.images, self.pixel_ops, c.interpolation, c.fill)
        )


@dataclass(frozen=True)
class EncodedBatch:
    """Input of a decoder: the plan of a batch and, in the same order, each sample's bytes (uint8).

    origins: int32 [B, 2], left and top, pixels, of the part of each sample that `data` holds; None: all are whole.
    """

    step: int
    planned: Planned
    data: list[np.ndarray]
    origins: np.ndarray | None = None

    def windows(self) -> np.ndarray:
        """The planned windows, int32 [B, 4], in the pixels of `data`."""
        windows = self.planned.windows
        if self.origins is None:
            return windows
        return np.concatenate([windows[:, :2] - self.origins, windows[:, 2:]], 1)

    def only(self, position: int) -> "EncodedBatch":
        """One sample of the batch, as a batch."""
        here = slice(position, position + 1)
        origins = None if self.origins is None else self.origins[here]
        return EncodedBatch(self.step, self.planned.at(here), self.data[here], origins)


class UndecodableSample(Exception):
    """Raised by a decoder: position `position` of the batch of `step` can't be decoded."""

    def __init__(self, step: int, position: int, reason: str):
        super().__init__(f"step {step}, position {position}: {reason}")
        self.step, self.position, self.reason = step, position, reason


class Decoder(Protocol):
    """`DaliDecoder` or `ReferenceDecoder`. takes_parts: can it be given a part of a sample that holds its window?"""

    takes_parts: bool

    def prepare(self, data: np.ndarray) -> np.ndarray:
        """What `decode` is to be given for a sample's bytes, uint8 [n]. Raises OSError or ValueError. Called by many
        threads."""

    def rescue(self, data: np.ndarray) -> np.ndarray | None:
        """The same for what `decode` refused; None where there is no other way."""

    def decode(self, batches: Iterable[EncodedBatch]) -> Iterator[torch.Tensor]:
        """Images uint8 [B, H, W, 3] of each batch, in order. Raises UndecodableSample."""

    def close(self) -> None: ...


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
        max_unreadable: distinct unreadable samples that are tolerated; one more raises TransientError.
    """

    def __init__(
        self,
        plan: TrainPlan | EvalPlan,
        source: Source,
        decoder: Decoder,
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
        self.unreadable: dict[int, str] = {}  # sample id -> reason: all that this rank has found
        self.missing = 0  # images of the split that are not in the index, as they could not be read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")  # batch after batch; others help (`hurry`)
        self._skip: frozenset[int] = frozenset()

    def _record_unreadable(self, sample_id: int, reason: str) -> None:
        if sample_id not in self.unreadable:
            self.unreadable[sample_id] = reason
        if len(self.unreadable) > self.max_unreadable:
            raise TransientError(
                f"more than {self.max_unreadable} unreadable samples, the last one {self.source.describe(sample_id)} "
                f"({reason}); check the data with: pipeline verify ROOT"
            )

    def _read_substitute(self, sample_id: int) -> tuple[int, np.ndarray] | None:
        """The first readable substitute of an unreadable sample, and its bytes; None where it is to be left out."""
        for attempt in range(MOST_SUBSTITUTES):
            candidate = self.plan.substitute(sample_id, attempt)
            if candidate is None:
                return None
            if candidate in self._skip or candidate in self.unreadable:
                continue
            try:
                return candidate, self.source.read(candidate, self.decoder.prepare)
            except UnreadableSample as error:
                self._record_unreadable(error.sample_id, error.reason)
        raise TransientError(
            f"no readable substitute for {self.source.describe(sample_id)}; check the data: pipeline verify ROOT"
        )

    def _replace_unreadable(
        self,
        step: int,
        planned: Planned,
        data: list[np.ndarray | UnreadableSample],
        origins: np.ndarray | None = None,
    ) -> EncodedBatch:
        """Replace (training) or leave out (validation) the samples for which `data` holds an exception."""
        readable = {i: item for i, item in enumerate(data) if not isinstance(item, UnreadableSample)}
        if len(readable) == len(data):
            return EncodedBatch(step, planned, list(readable.values()), origins)
        ids = planned.ids.copy()
        origins = None if origins is None else origins.copy()
        for i in sorted(set(range(len(data))) - readable.keys()):
            found = self._read_substitute(int(ids[i]))
            if found is not None:
                ids[i], readable[i] = found
                if origins is not None:
                    origins[i] = 0  # a substitute is read as a whole
        kept = sorted(readable)
        if len(kept) < len(data):
            ids, planned = ids[kept], planned.at(kept)
            origins = None if origins is None else origins[kept]
        return EncodedBatch(step, self.plan.with_ids(planned, ids), [readable[i] for i in kept], origins)

    def _read(self, planned: Planned) -> tuple[list[np.ndarray | UnreadableSample], np.ndarray | None]:
        """The bytes of each sample, or an exception; and, where some are parts, their origins (`EncodedBatch`)."""
        if self.source.split.restart is None or not self.decoder.takes_parts:
            return self.source.read_batch(planned.ids, self.decoder.prepare), None
        pieces = self.source.read_windows(planned.ids, planned.windows, self.decoder.prepare)
        data = [piece.data if isinstance(piece, Piece) else piece for piece in pieces]
        corners = [(piece.left, piece.top) if isinstance(piece, Piece) else (0, 0) for piece in pieces]
        return data, np.array(corners, np.int32).reshape(-1, 2)

    def _prepare(self, step: int) -> EncodedBatch:
        planned = self.plan.local(step, self.rank, self.world_size)
        self.plan.prepare_order(step)
        ids, skip = planned.ids.tolist(), self._skip
        wanted = [i for i, sample_id in enumerate(ids) if sample_id not in skip]
        found, parts = self._read(planned.at(wanted))  # to try one that is known to be unreadable may take seconds
        items = iter(found)
        data = [UnreadableSample(i, "on the blacklist") if i in skip else next(items) for i in ids]
        for i in wanted:
            if isinstance(item := data[i], UnreadableSample):
                self._record_unreadable(ids[i], item.reason)
        origins = None
        if parts is not None:
            origins = np.zeros((len(ids), 2), np.int32)
            origins[wanted] = parts
        return self._replace_unreadable(step, planned, data, origins)

    def batches(
        self, start: int, stop: int, skip: frozenset[int] = frozenset(), augmented: bool = True
    ) -> Generator[Batch]:
        """The batches of steps start..stop-1. `skip`: samples known to be unreadable before `start`. augmented: on a
        GPU, apply the pixel ops here; on a CPU the step does, whatever this says."""
        self._skip = skip
        batches = self._batches(start, stop)
        if self.device.type != "cuda":
            return batches
        return prefetch_to_device(batches, self.device, self._augmented if augmented else lambda batch: batch)

    def _augmented(self, batch: Batch) -> Batch:
        """The batch with its pixel ops applied: on a GPU here, beside the step before it; on a CPU by the step."""
        if batch.pixel_ops is None or not isinstance(self.plan, TrainPlan):
            return batch
        return replace(batch, images=batch.augmented(self.plan.augment), pixel_ops=None)

    def _batches(self, start: int, stop: int) -> Generator[Batch]:
        reading: dict[int, Future] = {}
        in_decoder: dict[int, EncodedBatch] = {}  # given to the decoder, not yet delivered; in order
        repaired: dict[int, EncodedBatch] = {}  # to be given to the decoder again after it failed

        def feed(first: int) -> Iterator[EncodedBatch]:
            for step in range(first, stop):
                for coming in range(step, min(step + self.prefetch, stop)):
                    if coming not in reading and coming not in repaired:
                        reading[coming] = self._pool.submit(self._prepare, coming)
                if step not in repaired and not reading[step].done():
                    self.source.threads.hurry(more=step - first >= 4 * self.prefetch)  # the first ones are always late
                encoded = repaired.pop(step) if step in repaired else reading.pop(step).result()
                if encoded.data:
                    in_decoder[step] = encoded
                    yield encoded

        position = start
        try:
            while position < stop:
                try:
                    for images in self.decoder.decode(feed(position)):
                        step = next(iter(in_decoder))
                        position = step + 1
                        yield self._batch(images, in_decoder.pop(step))
                    return
                except UndecodableSample as error:
                    in_decoder[error.step] = self._without(in_decoder[error.step], error)
                    repaired.update(in_decoder)
                    in_decoder.clear()
                    position = error.step
        finally:
            for future in reading.values():
                future.cancel()

    def _without(self, encoded: EncodedBatch, error: UndecodableSample) -> EncodedBatch:
        """The batch with a sample whose bytes are those indexed but which the decoder refused: decoded another way, or
        replaced."""
        sample_id = int(encoded.planned.ids[error.position])
        rescued = self.decoder.rescue(encoded.data[error.position])
        if rescued is not None:
            whole = [*encoded.data[: error.position], rescued, *encoded.data[error.position + 1 :]]
            return replace(encoded, data=whole)
        self._record_unreadable(sample_id, error.reason)
        data: list[np.ndarray | UnreadableSample] = list(encoded.data)
        data[error.position] = UnreadableSample(sample_id, error.reason)
        return self._replace_unreadable(encoded.step, encoded.planned, data, encoded.origins)

    def _batch(self, images: torch.Tensor, encoded: EncodedBatch) -> Batch:
        planned = encoded.planned
        ids, targets = (deliver(array, self.device) for array in (planned.ids, self.labels[planned.ids]))
        pixel_ops = PixelOps.of(planned.augment_params, planned.size, self.device)
        erase_mix = EraseAndMix.of(planned.augment_params, planned.mixing, self.device)
        if self.device.type == "cuda" and not images.is_cuda:
            images = images.pin_memory().to(self.device, non_blocking=True)
        return Batch(images, targets, ids, pixel_ops, erase_mix)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.decoder.close()
        self.source.close()
