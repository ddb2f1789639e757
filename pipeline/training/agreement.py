"""What all ranks must have alike: the weights, compared by digest."""

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import BrokenError
from pipeline.training.distributed import World


def compare_parameters(model: nn.Module, world: World, step: int) -> None:
    """Raises BrokenError, on all ranks, that names the first parameter in which a rank differs. Collective.

    Each rank digests its own: the sum of each tensor's bits taken as integers, which any single flipped bit changes.
    """
    if world.size == 1:
        return
    named = list(model.named_parameters())
    sums = [p.detach().flatten().view(torch.int32).sum(dtype=torch.int64) for _, p in named]
    mine = torch.stack(sums).cpu()
    everyone = torch.empty(world.size * len(mine), dtype=torch.int64)
    dist.all_gather_into_tensor(everyone, mine)
    table = everyone.view(world.size, -1)
    common = table.mode(dim=0).values
    odd = (table != common).nonzero()
    if not len(odd):
        return
    tensor = int(odd[:, 1].min())
    ranks = sorted(int(rank) for rank, where in odd.tolist() if where == tensor)
    who = f"rank {ranks[0]} differs from the others" if world.size > 2 else "ranks 0 and 1 differ"
    raise BrokenError(
        f"step {step}: {who} in {named[tensor][0]}, where all must be alike: a faulty GPU or memory? Nothing was saved "
        "since the ranks last agreed; leave that node out and start again",
        alike=True,
    )
