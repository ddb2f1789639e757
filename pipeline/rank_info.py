"""Where a process stands among the ranks of a job."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class RankInfo:
    """One rank of `size`; of the `local_size` ranks on its node it is number `local_rank`. device: where it computes.
    cores: of this machine that it may fill with threads; 0: an equal part of those that the process may use. The
    default is a process alone, on the CPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = 0

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0
