"""What must be the same on all ranks: programs, settings and data at the start, and the weights, by digest."""

import hashlib
import platform
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import pipeline
from pipeline.config import Config, semantic_config
from pipeline.errors import TransientError, UserError
from pipeline.training.ranks.world import World

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, int64 [], of a tensor's bits taken as integers, which any single flipped bit changes."""
    bits = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return bits.flatten().view(_INTEGERS[bits.element_size()]).sum(dtype=torch.int64)


def compare_parameters(model: nn.Module, world: World, step: int) -> None:
    """Raises TransientError, on all ranks, that names the first parameter in which a rank differs. Collective.

    Each rank digests its own, by `bit_sum`.
    """
    if world.size == 1:
        return
    named = list(model.named_parameters())
    sums = [bit_sum(parameter) for _, parameter in named]
    mine = torch.stack(sums).cpu()
    everyone = torch.empty(world.size * len(mine), dtype=torch.int64)
    with world.watch.collective("the comparison of parameters"):
        dist.all_gather_into_tensor(everyone, mine)
    table = everyone.view(world.size, -1)
    common = table.mode(dim=0).values
    odd = (table != common).nonzero()
    if not len(odd):
        return
    tensor = int(odd[:, 1].min())
    ranks = sorted(int(rank) for rank, where in odd.tolist() if where == tensor)
    who = f"rank {ranks[0]} differs from the others" if world.size > 2 else "ranks 0 and 1 differ"
    raise TransientError(
        f"step {step}: {who} in {named[tensor][0]}, where all must be equal: a faulty GPU or memory? Nothing was saved "
        "since the ranks last agreed; leave that node out and start again",
        on_all_ranks=True,
    )


#: may differ from node to node: where the data lies (what it is, is compared), and how many cores decode
_LOCAL = ("data.root", "data.index", "data.threads")


def program_and_settings(config: Config, world: World) -> dict[str, str]:
    """What a rank runs, by name; the program itself is read by one rank a node."""
    facts = {
        f"--{name}": str(value)
        for name, value in semantic_config(config, everything=True).items()
        if name not in _LOCAL
    }
    facts |= {"Python": platform.python_version(), "torch": torch.__version__}
    if world.local_rank == 0:
        facts["pipeline's code"] = code_digest()
    return facts


def code_digest() -> str:
    """Of the package's Python files: names and contents."""
    state = hashlib.sha256()
    home = Path(pipeline.__file__).parent
    for path in sorted(home.rglob("*.py")):
        data = path.read_bytes()
        state.update(f"{path.relative_to(home)} {len(data)} ".encode() + data)
    return state.hexdigest()[:12]


def refuse_differences(facts: dict[str, str], world: World) -> None:
    """Raises UserError, on all ranks, that says which of these facts differ, and where. Collective."""
    if world.size == 1:
        return
    everyone: list[dict] = [{} for _ in range(world.size)]
    with world.watch.collective("the comparison of settings"):
        dist.all_gather_object(everyone, facts)
    differing = []
    for name in dict.fromkeys(name for there in everyone for name in there):
        values = {rank: there[name] for rank, there in enumerate(everyone) if name in there}
        first, *others = values.items()
        odd = next((item for item in others if item[1] != first[1]), None)
        if odd is not None:
            pair = " and ".join(f"{value} on {world.watch.names[rank]}" for rank, value in (first, odd))
            differing.append(f"{name} is {pair}")
    if differing:
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(f"the ranks differ: {'; '.join(differing[:5])}{more}; start all with the same")
