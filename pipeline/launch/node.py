"""A node of a job, and what the job allows. Knows no sockets, no torch."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a job allows.

    Attributes:
        min_nodes, max_nodes: of a world; further nodes wait as spares.
        max_restarts: after a failure of a worker. A lost node does not count.
        join_timeout_s: for the first `min_nodes` nodes to come.
        last_call_s: for more than `min_nodes` to come, in the first round.
        rejoin_timeout_s: for lost nodes to come back, where fewer than `min_nodes` are left.
        batch_size: the global batch size, which the number of ranks must divide; None: any number will do.
    """

    min_nodes: int
    max_nodes: int
    max_restarts: int = 0
    join_timeout_s: float = 600.0
    last_call_s: float = 30.0
    rejoin_timeout_s: float = 600.0
    batch_size: int | None = None


@dataclass
class Node:
    """A launcher that is connected. `key`: of its connection. `name`: host and pid. `place`: in the last round's world.
    `exit_code`: of its workers in the present round; None: they run. `training`: is it in the present world?"""

    key: int
    name: str
    ranks: int
    node_rank: int | None = None
    place: int | None = None
    exit_code: int | None = None
    failure: str = ""
    training: bool = False
    notice: str = ""

    def order(self) -> tuple:
        """Nodes that trained before come first, in their order; then by --node-rank, then by name, n2 before n10."""
        parts = [(int(text), "") if text.isdigit() else (0, text) for text in re.split(r"(\d+)", self.name)]
        later = self.place is None
        return later, self.place or 0, self.node_rank is None, self.node_rank or 0, parts
