"""Evaluation: every validation image exactly once over all ranks."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pipeline.loader.stream import Stream
from pipeline.training.distributed import World
from pipeline.training.preemption import StopRequest
from pipeline.training.step import autocast


@dataclass(frozen=True)
class Scores:
    """val_loss: mean cross-entropy. val_top1, val_top5: percent. images: how many were scored, over all ranks."""

    val_loss: float
    val_top1: float
    val_top5: float
    images: int


def share_buffers(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers (BatchNorm's running statistics). Collective."""
    if world.size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


def evaluate(network: nn.Module, stream: Stream, world: World, precision: str, stop: StopRequest) -> Scores | None:
    """Score `network` (uint8 images in, logits out) on all batches of a validation stream. Collective.

    Returns None on all ranks if any of them was asked to stop meanwhile.
    """
    was_training = network.training
    network.eval()
    share_buffers(network, world)
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, images
    steps = stream.plan.steps(world.size)
    batches = stream.batches(0, steps)
    try:
        with torch.inference_mode():
            for _ in range(steps):  # the same number on every rank, though one may have no batch left
                if world.any(bool(stop)):
                    return None
                batch = next(batches, None)
                if batch is not None:
                    with autocast(world.device, precision):
                        logits = network(batch.images)
                    sums += score(logits.float(), batch.targets)
    finally:
        batches.close()
        network.train(was_training)
    loss, top1, top5, images = world.sum(sums.tolist())
    return Scores(loss / images, 100 * top1 / images, 100 * top5 / images, int(images))


def score(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over a batch, float64 [4]: cross-entropy, hits of the first guess, hits of the first five, images.

    logits: float [B, K]; targets: int64 [B]. With fewer than five classes the last is over all of them.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = guesses == targets[:, None]
    loss = cross_entropy(logits, targets, reduction="sum")
    counted = torch.tensor(len(targets), dtype=torch.float64, device=logits.device)
    return torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double(), counted])
