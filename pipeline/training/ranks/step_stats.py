"""What all ranks learn of each step: losses, waiting times, votes to stop or save, and the ids that were really used.

One small all-gather a step carries it, beside the training's own stream on a GPU. It is read `lag` steps later, when
the device has long finished it, so nobody waits; and since every rank reads the same statistics at the same distance,
all decide the same without a further message.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.training.ranks.world import World

_LOSS, _HITS, _NORM, _SCALE, _VOTE, _WAIT, _TIME, _OWN, _HEAD = range(9)


class Vote(IntEnum):
    """What a rank asks of all ranks; the greatest vote counts."""

    NONE = 0
    SNAPSHOT = 1  # a copy of the state in each node's memory
    SAVE = 2
    REGROUP = 3  # save and stop, to start again with other nodes
    STOP = 4


@dataclass(frozen=True)
class StepStats:
    """One step over all ranks.

    Attributes:
        step: number of steps done with it.
        loss: mean over the global batch.
        top1: percent of its images.
        grad_norm: of the mean gradient.
        scale: fp16's loss scale, else 1.
        vote: the greatest of all ranks.
        wait_s, step_s: seconds, of the rank that waited longest and of rank 0.
        ids: int64 [global_batch_size], as they were used.
        own_s: float64 [ranks], see `stragglers`.
    """

    step: int
    loss: float
    top1: float
    grad_norm: float
    scale: float
    vote: Vote
    wait_s: float
    step_s: float
    ids: torch.Tensor
    own_s: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))


class _Pending(NamedTuple):
    """An exchange under way. landing: where the statistics of all ranks will be, on the host. event: when they are
    there, on a GPU. work: the all-gather. sent: kept until then, as the device still reads it."""

    step: int
    landing: torch.Tensor
    event: torch.cuda.Event | None
    work: Any
    sent: tuple[torch.Tensor, ...]


class StepStatsExchange:
    """Gathers each step's statistics and returns them `lag` steps later (0 on the CPU: there is nothing to hide)."""

    def __init__(self, world: World, lag: int | None = None):
        self.world = world
        on_gpu = world.device.type == "cuda"
        self.lag = (2 if on_gpu else 0) if lag is None else lag
        self.pending: deque[_Pending] = deque()
        self._beside = torch.cuda.Stream(world.device) if on_gpu else None

    def push(
        self,
        step: int,
        numbers: torch.Tensor,
        ids: torch.Tensor,
        vote: Vote,
        wait_s: float,
        step_s: float,
        own_s: float = 0.0,
    ) -> None:
        """Send this rank's statistics of a step; `step` steps are done with it. numbers: [4] as `TrainStep` returns
        them; ids: int64 [local batch]; both on the device."""
        host = torch.tensor([0.0, 0.0, 0.0, 0.0, float(vote), wait_s, step_s, own_s], dtype=torch.float64)
        if self.world.device.type == "cuda":
            host = host.pin_memory()
        mine = torch.empty(_HEAD + len(ids), dtype=torch.float64, device=self.world.device)
        mine[:_HEAD].copy_(host, non_blocking=True)
        mine[: len(numbers)] = numbers
        mine[_HEAD:] = ids  # exact: ids are far below 2^53
        everyone = torch.empty(self.world.size * len(mine), dtype=torch.float64, device=self.world.device)
        with self.world.watch.collective("the exchange of step statistics"):
            work = dist.all_gather_into_tensor(everyone, mine, async_op=True)
        assert work is not None  # this rank is one of the group
        landing, event = everyone, None
        if self._beside is not None:
            with torch.cuda.stream(self._beside):  # the training's stream waits for nobody's statistics
                work.wait()
                landing = torch.empty(everyone.shape, dtype=everyone.dtype, pin_memory=True)
                landing.copy_(everyone, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
        self.pending.append(_Pending(step, landing, event, work, (mine, everyone)))

    def due(self, everything: bool = False) -> list[StepStats]:
        """The statistics that are at least `lag` steps old, or all of them; oldest first."""
        ready = []
        while self.pending and (everything or len(self.pending) > self.lag):
            ready.append(self._read(self.pending.popleft()))
        return ready

    def _read(self, one: _Pending) -> StepStats:
        if one.event is not None:
            with self.world.watch.collective("the steps before this one on the GPU"):
                one.event.synchronize()
        else:
            with self.world.watch.collective("the exchange of step statistics"):
                one.work.wait()
        table = one.landing.view(self.world.size, -1)
        return StepStats(
            step=one.step,
            loss=table[:, _LOSS].mean().item(),
            top1=100 * table[:, _HITS].sum().item() / table[:, _HEAD:].numel(),
            grad_norm=table[0, _NORM].item(),
            scale=table[0, _SCALE].item(),
            vote=Vote(int(table[:, _VOTE].max())),
            wait_s=table[:, _WAIT].max().item(),
            step_s=table[0, _TIME].item(),
            ids=table[:, _HEAD:].reshape(-1).to(torch.int64),
            own_s=table[:, _OWN].clone(),
        )
