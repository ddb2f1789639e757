"""Which nodes train together, and what follows when one comes, is lost, fails or finishes. Knows no sockets, no torch.

One process of a job decides, the one that hosts the store, so the job can't split into two worlds. The launchers of the
nodes report to it and do what it says. Time is divided into rounds: in a round a fixed set of nodes trains, and the
number of the round is the generation that distinguishes later worlds from earlier ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.counts import count
from pipeline.errors import (
    EXIT_GPU_FAULT,
    EXIT_INTERRUPTED,
    EXIT_NODE_LOST,
    EXIT_OK,
    EXIT_REGROUP,
    EXIT_RETRY,
    EXIT_USER,
)
from pipeline.launch.node import Limits, Node

_SAVED = {EXIT_INTERRUPTED, EXIT_REGROUP, EXIT_OK}
SETTLE_S = 1.0  # after a node came, for others that come at the same time


@dataclass
class Membership:
    """Decides on the members of each round.

    Attributes:
        limits: what the job allows.
        send: sends a message to the launcher of a key.
        say: prints one line to the user.
        now: the time in seconds, of a clock that never jumps.
    """

    limits: Limits
    send: Callable[[int, dict], None]
    say: Callable[[str], None]
    now: Callable[[], float]
    nodes: dict[int, Node] = field(default_factory=dict)
    round: int = 0
    phase: str = "gathering"  # or training, stopping, ended
    why: str = ""  # the present stop: regroup, failure, loss or interrupt
    restarts: int = 0
    exit_code: int | None = None  # the job's, once it has ended
    asked_to_stop: str = ""
    changes: list[str] = field(default_factory=list)  # since the last round began, in words
    _since: float = 0.0  # when this phase began
    _came: float = 0.0  # when the last node came
    _enough_since: float | None = None

    def __post_init__(self) -> None:
        self._since = self._came = self.now()

    # --- what launchers report

    def join(self, node: Node) -> None:
        """A launcher has connected."""
        if self.phase == "ended":
            self.send(node.key, {"do": "end", "exit_code": self.exit_code})
            return
        self.nodes[node.key] = node
        if self.round:
            self.changes.append(f"{node.name} joined")
            self.say(f"{node.name} joined")
        self._came = self.now()
        if self.phase == "gathering":
            self._gather()

    def lose(self, key: int, how: str) -> None:
        """A launcher is gone: its connection was closed, or it has been silent for too long."""
        node = self.nodes.pop(key, None)
        if node is None or self.phase == "ended":
            return
        self.changes.append(f"{node.name} was lost")
        left = sum(other.training for other in self.nodes.values())
        if not node.training:
            self.say(f"{node.name}, a spare, was lost ({how})")
            return
        self.say(f"{node.name} was lost in round {self.round} ({how}); {count(left, 'node')} left")
        if self.phase == "training":
            self._stop("loss")
        elif self.phase == "stopping" and self.why == "regroup":
            self._stop("loss")  # they can't save together any more
        elif self.phase == "stopping":
            self.why = "loss" if self.why == "failure" else self.why
            self._stopped()

    def ask_to_stop(self, key: int, reason: str) -> None:
        """Somebody asked a launcher to save and stop; its ranks inform the others at their next step, if it has any."""
        self.asked_to_stop = self.asked_to_stop or reason
        if self.phase == "gathering":
            self.end(EXIT_INTERRUPTED)
        elif self.phase == "training" and not any(node.key == key for node in self._training()):
            for node in self._training():
                self.send(node.key, {"do": "stop", "round": self.round, "why": "request"})

    def report(self, key: int, round_: int, exit_code: int, failure: str = "") -> None:
        """All workers of a node have ended. exit_code: as `pipeline.errors` has it; negative: by a signal. failure:
        which rank failed, in words."""
        node = self.nodes.get(key)
        if node is None or not node.training or round_ != self.round or self.phase not in ("training", "stopping"):
            return
        node.exit_code, node.failure = exit_code, failure
        if exit_code == EXIT_USER:
            self.end(EXIT_USER)
        elif exit_code == EXIT_GPU_FAULT:
            self._leave_out(node)
        elif self.phase == "stopping" and self.why == "regroup" and exit_code not in _SAVED:
            self._stop("failure")  # the others can't save without it
        elif self.phase == "stopping":
            self._stopped()
        elif exit_code == EXIT_OK:
            if all(other.exit_code == EXIT_OK for other in self._training()):
                self.end(EXIT_OK)
        elif exit_code == EXIT_INTERRUPTED:
            self._stop("interrupt")
        else:
            self._stop("regroup" if exit_code == EXIT_REGROUP else "failure")

    def tick(self) -> None:
        """Look at the clock."""
        if self.phase == "gathering":
            self._gather()
        elif self.phase == "training" and self.now() - self._came >= SETTLE_S:
            self._grow()

    # --- rounds

    def _training(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.training]

    def choose(self) -> list[Node]:
        """The nodes of the best world that can be had now, in the order of their ranks; empty: none."""
        ready = sorted(self.nodes.values(), key=Node.order)[: self.limits.max_nodes]
        while len(ready) >= self.limits.min_nodes and ready:
            if self._divides(ready):
                return ready
            ready.pop()
        return []

    def _divides(self, nodes: list[Node]) -> bool:
        size = self.limits.batch_size
        return size is None or size % sum(node.ranks for node in nodes) == 0

    def _gather(self) -> None:
        """Begin a round, if it is time."""
        now, limits = self.now(), self.limits
        if self.asked_to_stop:
            self.end(EXIT_INTERRUPTED)
            return
        world = self.choose()
        enough = len(self.nodes) >= limits.min_nodes
        self._enough_since = (self._enough_since or now) if enough else None
        if self.round == 0:
            full = len(self.nodes) >= limits.max_nodes
            called = self._enough_since is not None and now - self._enough_since >= limits.last_call_s
            if world and (full or called):
                self._begin(world)
            elif enough and not world and (full or called):
                self._refuse_batch()
            elif not enough and now - self._since >= limits.join_timeout_s:
                self.say(
                    f"{len(self.nodes)} of {limits.min_nodes} nodes came within {limits.join_timeout_s:.0f} s: "
                    f"{', '.join(node.name for node in self.nodes.values()) or 'none'}; do the others reach this one?"
                )
                self.end(EXIT_NODE_LOST)
        elif world:
            self._begin(world)
        elif now - self._since >= limits.rejoin_timeout_s:
            self.say(
                f"{count(len(self.nodes), 'node')} left, {limits.min_nodes} required (--nnodes); start the job again "
                "to resume"
            )
            self.end(EXIT_NODE_LOST)

    def _refuse_batch(self) -> None:
        ranks = _ranks(list(self.nodes.values()))
        some = f", or by those of at least {self.limits.min_nodes}" if self.limits.min_nodes < len(self.nodes) else ""
        self.say(
            f"--train.global_batch_size {self.limits.batch_size} is not divisible by the {count(ranks, 'rank')} of "
            f"{count(len(self.nodes), 'node')}{some}; give a multiple, or other --nproc-per-node or --nnodes MIN:MAX"
        )
        self.end(EXIT_USER)

    def _begin(self, world: list[Node]) -> None:
        self.round += 1
        self.phase, self.why, self._enough_since = "training", "", None
        first, total = 0, _ranks(world)
        for node in self.nodes.values():
            node.training, node.exit_code, node.failure = node in world, None, ""
        if self.round > 1 or len(self.nodes) > len(world) or len(world) > 1:
            names = ", ".join(node.name for node in world[:8]) + (", ..." if len(world) > 8 else "")
            self.say(f"round {self.round}: {count(len(world), 'node')}, {count(total, 'rank')}: {names}")
        reason = "; ".join(self.changes)
        self.changes = []
        for place, node in enumerate(world):
            node.place, node.notice = place, ""
            facts = {"round": self.round, "group_rank": place, "group_size": len(world), "first_rank": first}
            self.send(node.key, {"do": "train", **facts, "world_size": total, "reason": reason})
            first += node.ranks
        for node in self.nodes.values():
            if not node.training:
                node.place = None
                self._tell_spare(node, len(world))

    def _tell_spare(self, node: Node, used: int) -> None:
        full = used >= self.limits.max_nodes
        why = (
            f"{count(used, 'node')} in training, the most that --nnodes allows"
            if full
            else f"a global batch of {self.limits.batch_size} is not divisible by more ranks"
        )
        if node.notice != why:
            node.notice = why
            self.say(f"{node.name} waits as a spare: {why}")
            self.send(node.key, {"do": "wait"})

    def _grow(self) -> None:
        """Stop the world, saved, if a larger one can be had."""
        if any(node.exit_code is not None for node in self._training()) or self.asked_to_stop:
            return
        world = self.choose()
        now = _ranks(self._training())
        if sum(node.ranks for node in world) > now:
            self.say(f"the {count(now, 'rank')} save at their next step, to start again as {_ranks(world)}")
            self._stop("regroup")
            return
        for node in self.nodes.values():
            if not node.training:
                self._tell_spare(node, len(self._training()))

    def _stop(self, why: str) -> None:
        """Have all workers of this round stopped."""
        self.phase, self.why = "stopping", why
        for node in self._training():
            self.send(node.key, {"do": "stop", "round": self.round, "why": why})
        self._stopped()

    def _stopped(self) -> None:
        """Go on when all workers have ended."""
        members = self._training()
        if any(node.exit_code is None for node in members):
            return
        codes = {node.exit_code for node in members}
        if EXIT_INTERRUPTED in codes or (self.asked_to_stop and members):
            self.end(EXIT_INTERRUPTED if codes <= _SAVED else EXIT_RETRY)
            return
        if self.why == "failure" and not self._restart(members):
            return
        self.phase, self._since = "gathering", self.now()
        self._gather()

    def _restart(self, members: list[Node]) -> bool:
        """May the workers be started again after a failure?"""
        failed = [node for node in members if node.failure]
        failed.sort(key=lambda node: (node.exit_code or 0) > 0)  # ended by a signal: the others only noticed
        what = failed[0].failure if failed else "a worker failed"
        if self.restarts >= self.limits.max_restarts:
            used = f" after {count(self.restarts, 'restart')}" if self.restarts else ""
            self.say(f"{what}{used}; see above for its reason")
            self.end(EXIT_RETRY)
            return False
        self.restarts += 1
        self.changes.append(what)
        self.say(f"{what}; restart {self.restarts} of {self.limits.max_restarts}")
        return True

    def _leave_out(self, node: Node) -> None:
        """A GPU of this node failed: it trains no more."""
        self.say(f"{node.failure or node.name}: a GPU fault; {node.name} is left out")
        self.changes.append(f"{node.name} was left out after a GPU fault")
        del self.nodes[node.key]
        self.send(node.key, {"do": "end", "exit_code": EXIT_GPU_FAULT})
        if len(self.nodes) < self.limits.min_nodes:
            self.end(EXIT_GPU_FAULT)
        elif self.phase == "training" or self.why == "regroup":
            self._stop("loss")  # the others can't go on, nor save, without it
        else:
            self._stopped()

    def end(self, exit_code: int) -> None:
        """The job has ended; every launcher ends with this code."""
        self.phase, self.exit_code = "ended", exit_code
        for node in self.nodes.values():
            self.send(node.key, {"do": "end", "exit_code": exit_code})


def _ranks(nodes: list[Node]) -> int:
    return sum(node.ranks for node in nodes)
