"""Nodes of a running job are lost again and again; each loss counts only if nothing but that node was lost.

The store is in a process of its own, three launchers at most train together. A try kills a node, or its launcher alone,
or freezes it until the others train without it; then it wakes and joins again, or a new one is started. Tries follow
each other at once, so losses also hit a job that is growing.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline.errors import TransientError
from pipeline.insight.chaos.compare import check_samples, rows_of
from pipeline.insight.chaos.faults import descendants, send
from pipeline.insight.chaos.nodes import NodeJob, ranks_of
from pipeline.progress import Progress

KINDS = ("node killed", "launcher killed", "node frozen")
MOST = 3  # nodes that train together
_FAILED_STARTS = 3  # of jobs, one after the other: no more are started
_LOST = ("was lost in round", ", a spare, was lost")


class Burners:
    """Processes that keep a core busy each. `count`: how many."""

    def __init__(self, count: int):
        self._processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]

    def __enter__(self) -> "Burners":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


class Tries:
    """Loses nodes of one job.

    Args:
        job: not started yet.
        seed: determines who is lost, how and when.
    """

    def __init__(self, job: NodeJob, seed: int):
        self.job, self.random = job, random.Random(seed)
        self.losses = 0

    def begin(self) -> None:
        """Start the job. Raises TransientError where it does not train."""
        self.job.serve_store()
        for _ in range(MOST):
            self.job.add_node()
        self.job.wait_for(lambda: self.job.has_trained(0), "first step")

    def lose(self, kind: str) -> float:
        """Lose a node while others train. Returns the seconds until they have done a step without it.

        Raises TransientError where more than that node was lost, or two worlds train.
        """
        job = self.job
        members = job.wait_for(self._members, "world of two ranks or more")
        time.sleep(self.random.uniform(0, 1))  # any moment, also one at which the job grows
        victim = self.random.choice([node for node in job.nodes if ranks_of(node)] or members)
        starts = len(job.starts())
        self.losses += 1
        frozen = [victim.pid, *descendants(victim.pid)] if kind == "node frozen" else []
        for pid in frozen:
            send(pid, signal.SIGSTOP)
        if not frozen:
            job.kill(victim, launcher_alone=kind == "launcher killed")
        begun = time.monotonic()
        job.wait_for(lambda: self._lost() >= self.losses and job.has_trained(starts), "step without the lost node")
        seconds = time.monotonic() - begun
        for pid in reversed(frozen):  # the rank before its launcher
            send(pid, signal.SIGCONT)
        if not frozen:
            job.add_node()
        job.wait_for(lambda: list(job.ranks().values()).count(0) < 2, "end of a second rank 0")
        self._check()
        return seconds

    def _members(self) -> list[subprocess.Popen]:
        """The nodes with ranks; [] where fewer than two train together."""
        members = [node for node in self.job.nodes if ranks_of(node)]
        return members if len(members) > 1 and self._training() > 1 else []

    def _training(self) -> int:
        """The ranks of the present world; 0 where it has not done a step."""
        starts = self.job.starts()
        return int(starts[-1]["world_size"]) if self.job.has_trained(0) else 0

    def _lost(self) -> int:
        return sum(len(self.job.said(text)) for text in _LOST)

    def _check(self) -> None:
        ended = [node.returncode for node in self.job.nodes if node.poll() is not None]
        if ended:
            raise TransientError(f"a launcher that was not touched ended with {ended[0]}")
        if self._lost() > self.losses:
            raise TransientError(f"{self._lost()} nodes were lost in {self.losses} losses")

    def end(self) -> None:
        """All nodes come together once more, and the ledger is looked at. Raises TransientError for what is wrong."""
        self.job.wait_for(lambda: self._training() == MOST, f"world of all {MOST} nodes")
        self._check()
        self.job.stop()
        self.job.close()
        steps = [row["step"] for row in rows_of(self.job.run, "train")]
        if steps != list(range(1, len(steps) + 1)):
            raise TransientError("the ledger's steps have gaps or repeats")
        for problem in check_samples(self.job.run):
            raise TransientError(problem)


def lose_nodes(
    work: Path, tries: int, load: int, seed: int = 0, limit_s: float = float("inf"), timeout_s: float = 120.0
) -> dict:
    """So many tries, with as many busy processes beside them; fewer where `limit_s` is over.

    Returns counts, the problems in words, the seconds of each good try, by kind. A problem ends its job, and a
    new one is started, unless several could not be started. work: made by `nodes.prepare`.
    """
    problems: list[str] = []
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    done = jobs = failed_starts = 0
    until = time.monotonic() + limit_s
    with Burners(load), Progress("bench elastic", tries, "tries") as progress:
        while done < tries and time.monotonic() < until and failed_starts < _FAILED_STARTS:
            jobs += 1
            begun = False
            what = f"start of job {jobs}"
            with NodeJob(work, f"tries-{jobs}", f"1:{MOST}", timeout_s=timeout_s) as job:
                series = Tries(job, seed + jobs)
                try:
                    series.begin()
                    begun = True
                    while done < tries and time.monotonic() < until:
                        done += 1
                        kind = KINDS[done % len(KINDS)]
                        what = f"try {done}, {kind}"
                        seconds[kind].append(round(series.lose(kind), 2))
                        progress.advance()
                    what = f"end of job {jobs}"
                    series.end()
                except TransientError as error:
                    failed_starts = 0 if begun else failed_starts + 1
                    problems.append(f"{what}: {error}")
                    (work.parent / f"{work.name}-problem-{len(problems)}.log").write_bytes(job.log.read_bytes())
    return {"tries": done, "jobs": jobs, "load": load, "problems": problems, "seconds": seconds}


def count_good(result: dict) -> int:
    """Of what `lose_nodes` returns: the tries in which nothing but the node was lost. Problems at a job's start or end
    are of no try."""
    return sum(map(len, result["seconds"].values()))
