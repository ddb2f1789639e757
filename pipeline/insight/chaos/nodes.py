"""A small training job whose nodes are launchers on this machine, one rank each: started, killed, frozen, looked at."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml

from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.errors import TransientError
from pipeline.insight.chaos.faults import descendants, send
from pipeline.insight.chaos.job import recipe
from pipeline.insight.status.run_state import read_events_and_evals, read_tail
from pipeline.run_paths import RunPaths
from pipeline.tracking.ledger_rows import is_start

T = TypeVar("T")
GLOBAL_BATCH_SIZE = 24  # 1, 2, 3 and 4 ranks divide it
OURS, TORCHRUN = "pipeline launch", "torchrun"
LAUNCHERS = {
    OURS: ["-m", "pipeline", "launch"],
    TORCHRUN: ["-m", "torch.distributed.run", "--max-restarts=3"],
}
POLL_S = 0.02


def prepare(work: Path) -> None:
    """Data set and recipe of a small training on a CPU, without an end."""
    generate_tree(work / "data", Settings(classes=4, train_per_class=24, val_per_class=6, seed=1, size=64, oddities=0))
    build_index(work / "data")
    settings = recipe(100_000, "shufflenet_v2_x0_5", "cpu", "disabled")
    settings["train"] |= {"global_batch_size": GLOBAL_BATCH_SIZE, "eval_every_epochs": 1e6}
    settings["schedule"] = {"epochs": 25_000}
    settings["checkpoint"] = {"every_steps": 20, "every_minutes": None, "every_epoch": False}
    (work / "recipe.yaml").write_text(yaml.safe_dump(settings))


def train_options(work: Path, run: Path) -> list[str]:
    """`train` and its options."""
    return [
        *("train", "--config", str(work / "recipe.yaml")),
        *("--data.root", str(work / "data"), "--run_dir", str(run)),
    ]


def environment() -> dict[str, str]:
    """Of the processes: one thread each."""
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "WANDB_MODE": "offline"}


@dataclass
class NodeJob:
    """The launchers of one job; `close` kills what is left of them.

    Attributes:
        work: folder made by `prepare`; the run folder and the log go there too.
        name: of the run folder and of the log.
        nnodes: as the option, "1:3".
        launcher: one of `LAUNCHERS`.
        timeout_s: for whatever is waited for.
        options, training: further options of the launcher, and of `train`.
        nodes: the launchers that were started and not killed.
    """

    work: Path
    name: str
    nnodes: str
    launcher: str = OURS
    timeout_s: float = 120.0
    options: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    nodes: list[subprocess.Popen] = field(default_factory=list)
    store: subprocess.Popen | None = None

    def __post_init__(self) -> None:
        self.run, self.log = self.work / self.name, self.work / f"{self.name}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def _start(self, *options: str) -> subprocess.Popen:
        meeting = [f"--nnodes={self.nnodes}", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=nodes"]
        meeting.append(f"--rdzv-endpoint=127.0.0.1:{self.port}")
        module = [] if self.launcher == OURS else ["-m", "pipeline"]
        command = [sys.executable, *LAUNCHERS[self.launcher], *meeting, *self.options, *options, *module]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*command, *train_options(self.work, self.run), *self.training],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )

    def add_node(self) -> subprocess.Popen:
        """Start a launcher."""
        self.nodes.append(self._start())
        return self.nodes[-1]

    def serve_store(self) -> None:
        """Host the rendezvous in a process of its own."""
        self.store = self._start("--serve-store")
        self.wait_for(self.is_open, "a rendezvous")

    def is_open(self) -> bool:
        """Is there a rendezvous?"""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    # --- what the run has done

    def starts(self) -> list[dict]:
        """The ledger's rows of starts."""
        ledger = RunPaths(self.run).ledger
        return list(filter(is_start, read_events_and_evals(ledger))) if ledger.exists() else []

    def last_step(self) -> int:
        """The last step in the ledger; 0 without any."""
        ledger = RunPaths(self.run).ledger
        tail = read_tail(ledger) if ledger.exists() else []
        return tail[-1]["step"] if tail else 0

    def has_trained(self, starts: int, steps: int = 1, world_size: int | None = None) -> bool:
        """Were there more than `starts` starts, and so many steps since the last one, by so many ranks?"""
        found = self.starts()
        if len(found) <= starts or world_size not in (None, found[-1]["world_size"]):
            return False
        return self.last_step() >= found[-1]["step"] + steps

    def wait_for(self, condition: Callable[[], T], what: str) -> T:
        """What `condition` returns as soon as that is true. Raises TransientError after `timeout_s`."""
        deadline = time.monotonic() + self.timeout_s
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TransientError(f"no {what} within {self.timeout_s:.0f} s")
            time.sleep(POLL_S)
        return found

    # --- processes

    def ranks(self) -> dict[int, int]:
        """Process id -> rank of the ranks of all launchers."""
        return {pid: rank for node in self.nodes for pid, rank in ranks_of(node).items()}

    def kill(self, node: subprocess.Popen, launcher_alone: bool = False) -> None:
        """As when a node goes: the launcher and all that it has started. Or the launcher alone."""
        below = [] if launcher_alone else descendants(node.pid)
        for pid in [node.pid, *below]:
            send(pid, signal.SIGKILL)
        node.wait()
        self.nodes.remove(node)

    def stop(self) -> None:
        """Have the ranks save and stop, by the stop file; wait until they have."""
        paths = RunPaths(self.run)
        paths.stop.write_text("enough\n")
        self.wait_for(paths.interrupted.exists, "save")

    def said(self, text: str) -> list[str]:
        """The lines of the launchers and ranks that hold `text`."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if text in line]

    def close(self) -> None:
        """Kill what is left."""
        for node in [*self.nodes, *filter(None, [self.store])]:
            if node.poll() is None:
                for pid in [node.pid, *descendants(node.pid)]:
                    send(pid, signal.SIGKILL)
                node.wait()

    def __enter__(self) -> "NodeJob":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ranks_of(node: subprocess.Popen) -> dict[int, int]:
    """Process id -> rank of the ranks that a launcher has started."""
    found = {}
    for pid in descendants(node.pid) if node.poll() is None else []:
        try:
            name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if name.startswith("rank "):
            found[pid] = int(name.removeprefix("rank ") or 0)
    return found
