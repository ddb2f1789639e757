"""Launchers for tests: several on this machine stand for the nodes of a job; they are real, and so are their deaths."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import runs

#: Shells and `pipeline launch` catch no signal that was ignored when they started, as below nohup, or behind & in a
#: script.
HEARD = ("env", "--default-signal=HUP,INT")

SMALL = ["--model.name", "shufflenet_v2_x0_5", "--model.zero_init_residual", "false", "--train.device", "cpu"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], object], limit_s: float = 120, say: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, say()
        time.sleep(0.02)  # polls a condition


class Job:
    """The launchers of one job. `program`: what stands after their options."""

    def __init__(self, folder: Path, program: list[str], nnodes: str, *options: str, nproc: int = 1):
        self.folder, self.program, self.nproc = folder, program, nproc
        self.options = [f"--nnodes={nnodes}", f"--nproc-per-node={nproc}", "--rdzv-backend=c10d", *options]
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = runs.environment()

    def start(self, name: str, *options: str, program: list[str] | None = None) -> subprocess.Popen:
        """Start a launcher; its output goes to a file of this name."""
        command = [sys.executable, "-m", "pipeline", "launch", *self.options, f"--rdzv-endpoint={self.endpoint}"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*HEARD, *command, *options, *(self.program if program is None else program)],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.processes[name]

    def serve(self) -> subprocess.Popen:
        """Start the process that hosts the rendezvous, and wait until it does."""
        process = self.start("store", "--serve-store")
        host, port = self.endpoint.split(":")

        def is_up() -> bool:
            assert process.poll() is None, self.output("store")
            with socket.socket() as probe:
                return probe.connect_ex((host, int(port))) == 0

        wait_for(is_up)
        return process

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def all_output(self) -> str:
        return "\n".join(f"--- {name}\n{self.output(name)[-3000:]}" for name in self.processes)

    def kill(self, name: str) -> None:
        """As when its node goes: the launcher and all that it has started."""
        process = self.processes[name]
        for pid in [process.pid, *descendants(process.pid)]:
            kill(pid, signal.SIGKILL)
        process.wait(30)

    def wait(self, name: str, limit_s: float = 120) -> int:
        try:
            return self.processes[name].wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.all_output()) from None

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                for pid in [process.pid, *descendants(process.pid)]:
                    kill(pid, signal.SIGCONT)
                    kill(pid, signal.SIGKILL)
                process.wait(30)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def said(self, pattern: str) -> list[str]:
        """What the launchers have printed that matches."""
        lines = [line for name in self.processes for line in self.output(name).splitlines()]
        return [line for line in lines if re.search(pattern, line)]


def kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Process ids of all that a process has started, and they in turn."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def rank_pids(pid: int) -> dict[int, int]:
    """Process id by rank of the ranks that a launcher has started."""
    found = {}
    for below in descendants(pid):
        try:
            name = Path(f"/proc/{below}/comm").read_text().strip()
        except OSError:
            continue
        if name.startswith("rank "):
            found.setdefault(int(name.removeprefix("rank ")), below)
    return found


def training(root: Path, run: Path, *options: str) -> list[str]:
    """The program of a small training."""
    return ["train", "--config", str(runs.TINY), "--data.root", str(root), "--run_dir", str(run), *SMALL, *options]
