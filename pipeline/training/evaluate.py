"""Evaluation: every validation image exactly once over all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipeline.errors import TransientError
from pipeline.loader.stream import Stream
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.world import World
from pipeline.training.recalibrate import keeping_buffers, recalibrate
from pipeline.training.setup import RunSetup
from pipeline.training.step import autocast

BINS = 15  # of the calibration error, equally wide (Guo et al. 2017)


@dataclass(frozen=True)
class Scores:
    """val_loss: mean cross-entropy. val_top1, val_top5: percent. val_ece: expected calibration error, percent. images:
    how many were scored, over all ranks. left_out: how many more there should be: those that can't be read, now or when
    the data set was indexed."""

    val_loss: float
    val_top1: float
    val_top5: float
    val_ece: float
    images: int
    left_out: int = 0


class Tally:
    """Sums over images, on one device: loss and hits; confidence and hits in each of `BINS`; hits in each class."""

    def __init__(self, classes: int, device: torch.device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
        self.bins = torch.zeros(BINS, 3, dtype=torch.float64, device=device)  # images, confidence, top-1
        self.classes = torch.zeros(classes, 3, dtype=torch.float64, device=device)  # images, top-1, top-5

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch. logits: float32 [B, K]; targets: int64 [B]."""
        guesses = guess(logits)
        self.sums += score(logits, targets, guesses)
        sure = logits.softmax(1).amax(1)
        hits = guesses == targets[:, None]
        first, among = hits[:, 0], hits.any(1)
        ones = torch.ones_like(sure)
        places = (sure * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # bin i: (i / 15, (i + 1) / 15]
        self.bins.index_add_(0, places, torch.stack([ones, sure, first], 1).double())
        self.classes.index_add_(0, targets, torch.stack([ones, first, among], 1).double())

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The sums by name, to be kept or filled."""
        return {prefix + name: getattr(self, name) for name in ("sums", "bins", "classes")}

    def over(self, world: World) -> "Evaluation":
        """The sums of all ranks. Collective."""
        parts = [self.sums, self.bins.flatten(), self.classes.flatten()]
        flat = np.array(world.sum(torch.cat(parts).tolist()))
        bins = flat[4 : 4 + 3 * BINS].reshape(BINS, 3)
        return Evaluation(flat[:4], bins, flat[4 + 3 * BINS :].reshape(-1, 3))


@dataclass(frozen=True)
class Evaluation:
    """Sums over all images, float64: [4], [BINS, 3] and [classes, 3] as in `Tally`.

    unreadable: file -> reason of the images that could not be read now; missing: how many the index left out before.
    among: the same where only some classes compete, if that was asked for.
    """

    sums: np.ndarray
    bins: np.ndarray
    classes: np.ndarray
    unreadable: dict[str, str] = field(default_factory=dict)
    missing: int = 0
    among: "Evaluation | None" = None

    @property
    def scores(self) -> Scores:
        loss, top1, top5, images = self.sums.tolist()
        error = np.abs(self.bins[:, 1] - self.bins[:, 2]).sum()  # each bin's gap, weighted by its images
        many = max(images, 1)
        left_out = self.missing + len(self.unreadable)
        shares = (100 * top1 / many, 100 * top5 / many, 100 * float(error) / many)
        return Scores(loss / many, *shares, int(images), left_out)


def share_buffers(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers (BatchNorm's running statistics). Collective."""
    if world.size > 1:
        for kind in sorted({buffer.dtype for buffer in model.buffers()}, key=str):
            buffers = [buffer for buffer in model.buffers() if buffer.dtype == kind]
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            torch.distributed.broadcast(flat, src=0)
            parts = flat.split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)])


def predict(network: nn.Module, images: torch.Tensor, ids: torch.Tensor, flip: bool, crops: bool) -> torch.Tensor:
    """Logits float32 [N, K] of a batch uint8 [B, H, W, 3] that holds N samples, each once or (`crops`) several times
    in a row.

    flip: the mean of each image's logits and its mirror image's. crops: the logarithm of the mean probability over a
    sample's crops and their mirror images (Krizhevsky et al. 2012, section 4.1).
    """
    views = [network(images).float()]
    if flip or crops:
        views.append(network(images.flip(2)).float())
    if not crops:
        return torch.stack(views).mean(0)
    chances = torch.stack([view.softmax(1) for view in views]).mean(0)
    _, places, counts = ids.unique_consecutive(return_inverse=True, return_counts=True)
    sums = chances.new_zeros(len(counts), chances.shape[1]).index_add_(0, places, chances)
    return (sums / counts[:, None]).clamp(min=torch.finfo(sums.dtype).tiny).log()


class Kept(Protocol):
    """Where an evaluation keeps its sums, so that the next process resumes it; one is
    `pipeline.evaluation.partial_sums.PartialSums`."""

    def restore(self, sums: Mapping[str, torch.Tensor]) -> tuple[int, dict[int, str]]:
        """Fill `sums` in place with what was kept. Returns the number of batches that are in them, and the images that
        could not be read (sample id -> reason); 0 and none where nothing was kept."""

    def is_due(self) -> bool:
        """Should `keep` be called after this batch?"""

    def keep(self, done: int, sums: Mapping[str, torch.Tensor], unreadable: Mapping[int, str]) -> None:
        """Write the sums of the first `done` batches, and the images of these that could not be read."""


def evaluate(
    network: nn.Module,
    stream: Stream,
    world: World,
    precision: str,
    stop: StopRequest,
    classes: int,
    flip: bool = False,
    crops: bool = False,
    among: Sequence[int] | None = None,
    kept: Kept | None = None,
) -> Evaluation | None:
    """Score `network` (uint8 images in, logits of `classes` classes out) on all batches of a validation stream; see
    `predict`. among: classes; also score with the logits of these alone. kept: where partial sums are, so that only the
    other batches are scored. Collective. Returns None on all ranks if any of them was asked to stop.

    Images that can't be read are left out and named in the result. Raises TransientError where they are more than the
    stream tolerates, over all ranks, or all.
    """
    stream.unreadable.clear()  # of an evaluation before
    was_training = network.training
    network.eval()
    with world.watch.collective("the exchange of buffers"):
        share_buffers(network, world)
    tally, own_tally = Tally(classes, world.device), Tally(classes, world.device)
    few = None if among is None else torch.tensor(among, device=world.device)
    sums = tally.tensors() | (own_tally.tensors("own_") if among is not None else {})
    steps = stream.plan.steps(world.size)
    done, last_ids = 0, None
    if kept is not None:
        done, unreadable_before = kept.restore(sums)
        stream.unreadable.update(unreadable_before)

    def keep() -> None:
        if kept is not None:
            first = done if last_ids is None else stream.plan.step_of(int(last_ids[-1]), world.rank, world.size) + 1
            kept.keep(first, sums, stream.unreadable)

    batches = stream.batches(done, steps)
    try:
        for _ in range(world.max(steps - done)):  # the same number on every rank, though one may have no batch left
            if world.any(bool(stop)):
                keep()
                return None
            if kept is not None and kept.is_due():
                keep()
            world.watch.phase("waiting for validation images")
            batch = next(batches, None)
            if batch is None:
                done, last_ids = steps, None
                continue
            with torch.inference_mode(), autocast(world.device, precision):
                logits = predict(network, batch.images, batch.ids, flip, crops)
            targets = batch.targets
            if crops:
                first = torch.ones_like(batch.ids, dtype=torch.bool)
                first[1:] = batch.ids[1:] != batch.ids[:-1]
                targets = targets[first]
            tally.add(logits, targets)
            if few is not None:
                others = torch.ones(classes, dtype=torch.bool, device=logits.device)
                others[few] = False
                own_tally.add(logits.masked_fill(others, -torch.inf), targets)
            last_ids = batch.ids
        done, last_ids = steps, None
        keep()
    finally:
        batches.close()
        network.train(was_training)
    unreadable = _unreadable_of_all(stream, world)
    of_few = None if few is None else own_tally.over(world)
    found = replace(tally.over(world), among=of_few, unreadable=unreadable, missing=stream.missing)
    if len(unreadable) > stream.max_unreadable or (unreadable and not found.scores.images):
        name, reason = next(iter(unreadable.items()))
        raise TransientError(
            f"{len(unreadable):,} of {found.scores.images + len(unreadable):,} validation images can't be read "
            f"(--data.max_unreadable is {stream.max_unreadable}), such as {name} ({reason}); check the data with: "
            "pipeline verify ROOT",
            on_all_ranks=True,
        )
    return found


def _unreadable_of_all(stream: Stream, world: World) -> dict[str, str]:
    """File -> reason of the validation images that could not be read, of all ranks, in the data set's order.
    Collective."""
    own = {sample: (stream.source.describe(sample), reason) for sample, reason in stream.unreadable.items()}
    if not world.any(bool(own)):
        return {}
    parts = world.gather(own)
    return dict(found for _, found in sorted(item for part in parts for item in part.items()))


def guess(logits: torch.Tensor) -> torch.Tensor:
    """int64 [B, 5], the classes with the largest logits (float [B, K]), the best first; all of them where there are
    fewer. Logits of 16 bits are often equal, and then this is the one choice that all scores go by."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def score(logits: torch.Tensor, targets: torch.Tensor, guesses: torch.Tensor | None = None) -> torch.Tensor:
    """Sums over a batch, float64 [4]: cross-entropy, hits of the first guess, hits of the first five, images.

    logits: float [B, K]; targets: int64 [B]; guesses: `guess(logits)`. With fewer than five classes the last is over
    all of them.
    """
    hits = (guess(logits) if guesses is None else guesses) == targets[:, None]
    loss = cross_entropy(logits, targets, reduction="sum")
    counted = torch.full((), len(targets), dtype=torch.float64, device=logits.device)
    return torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double(), counted])


def score_recalibrated(
    network: nn.Module, setup: RunSetup, train_stream: Stream, eval_stream: Stream, step: int, skip: frozenset[int]
) -> Evaluation | None:
    """The evaluation of a network in training after `step` steps; its buffers are afterwards as before. Collective.

    With `evaluation.recalibrate_batches`, BatchNorm's statistics are first computed over the last training batches,
    without the samples `skip`. Returns None on all ranks if any of them was asked to stop.
    """
    config, world, stop = setup.config, setup.world, setup.stop
    settings, precision = config.evaluation, config.train.precision
    at_once = config.train.local_micro_batch_size(world.size)
    last = range(max(0, step - settings.recalibrate_batches), step)
    with keeping_buffers(network):
        if settings.recalibrate_batches and not recalibrate(
            network, train_stream, last, skip, world, precision, stop, at_once
        ):
            return None
        evaluation = evaluate(network, eval_stream, world, precision, stop, setup.classes, settings.flip)
    return evaluation
