"""BatchNorm's statistics computed again, over training images and with the weights as they are now (Wu & Johnson 2021,
arXiv 2105.07576, section 3: the running statistics lag behind the weights, and are no average of theirs)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.loader.stream import Stream
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.world import World
from pipeline.training.step import autocast


@contextlib.contextmanager
def keeping_buffers(network: nn.Module) -> Iterator[None]:
    """Whatever happens to buffers in here is undone at the end."""
    kept = [buffer.clone() for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(network.buffers(), kept, strict=True):
                buffer.copy_(before)


def recalibrate(
    network: nn.Module,
    stream: Stream,
    steps: range,
    skip: frozenset[int],
    world: World,
    precision: str,
    stop: StopRequest,
    at_once: int | None = None,
) -> bool:
    """Set BatchNorm's running statistics to the mean over the batches of these training steps. Collective.

    Each rank looks at its slice, as it is cut and flipped, in pieces of `at_once` images as in training (default:
    whole), and the ranks' statistics are averaged. Layers whose parameters are frozen take part.
    Returns False on all ranks if any of them was asked to stop.
    """
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    was_training = network.training
    network.eval()  # drop-out and stochastic depth stay out of it
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
        norm.train()
    batches = stream.batches(steps.start, steps.stop, skip, augmented=False)
    try:
        with torch.no_grad():
            for batch in batches:
                if world.any(bool(stop)):
                    return False
                for images in batch.images.split(at_once or len(batch.images)):
                    with autocast(world.device, precision):
                        network(images)
            with world.watch.collective("the mean of BatchNorm's statistics"):
                for statistic in (s for norm in norms for s in (norm.running_mean, norm.running_var)):
                    assert statistic is not None
                    torch.distributed.all_reduce(statistic)
                    statistic /= world.size
    finally:
        batches.close()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.train(was_training)
    return True
