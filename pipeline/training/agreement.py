"""What all ranks must have alike: program, configuration and data at the start, the weights ever after."""

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import BrokenError, UserError
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


def compare_settings(settings: dict[str, str], world: World) -> None:
    """Raises UserError, on all ranks, that names the first setting in which a rank differs from rank 0. Collective."""
    everyone: list = [None] * world.size
    dist.all_gather_object(everyone, settings)
    for rank, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if name != "host" and theirs.get(name) != value:
                raise UserError(
                    f"rank {rank} on {theirs['host']} has another {name} than rank 0 on {everyone[0]['host']}: "
                    f"{theirs.get(name)} there, {value} on rank 0; start all ranks with the same"
                )
