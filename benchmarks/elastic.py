"""How long a job stands still after a node is lost: `pipeline launch` beside torchrun's defaults, phase by phase.

    python benchmarks/elastic.py [--rounds 3] [--timeout 240] [--json FILE]

Each launcher on this machine stands for a node with one rank on the CPU. One is killed (SIGKILL, with all that it has
started); the seconds from there count until the ranks that are left have ended (the loss is noticed), until the first
new rank runs (rendezvous and start of the process), until the checkpoint is loaded, and until the first new step is in
the ledger. Launchers take turns. After each trial the ledger must have every step once, with the batch digests and
learning rates of a run without a loss.
"""

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.errors import EXIT_OK, EXIT_RETRY, TransientError
from pipeline.insight.bench.interleaved import Spread, format_rows
from pipeline.insight.bench.results import default_path, write_result
from pipeline.insight.chaos.faults import descendants, send
from pipeline.insight.chaos.job import recipe
from pipeline.progress import Progress
from pipeline.tracking.ledger import is_start, read_rows

GLOBAL_BATCH_SIZE = 24  # 1, 2, 3 and 4 ranks divide it
STEPS_BEFORE = 30  # with all nodes, before one is killed
POLL_S = 0.005
PHASES = ("noticed", "new rank", "resumed", "first step")


@dataclass(frozen=True)
class Case:
    """nodes: launchers that are started. nnodes: as the option. before, after: world sizes."""

    name: str
    nodes: int
    nnodes: str
    before: int
    after: int


CASES = (
    Case("2 -> 1", 2, "1:2", 2, 1),
    Case("4 -> 3", 4, "1:4", 4, 3),
    Case("a spare takes over", 3, "2:2", 2, 2),
)
LAUNCHERS = {
    "pipeline launch": ["-m", "pipeline", "launch"],
    "torchrun": ["-m", "torch.distributed.run", "--max-restarts=3"],
}


class Trial:
    """One run that loses a node."""

    def __init__(self, work: Path, name: str, case: Case, launcher: str, timeout_s: float):
        self.timeout_s = timeout_s
        self.case, self.run, self.log = case, work / name, work / f"{name}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = [f"--nnodes={case.nnodes}", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
        options.append(f"--rdzv-endpoint=127.0.0.1:{port}")
        program = ["train"] if launcher == "pipeline launch" else ["-m", "pipeline", "train"]
        options += [*program, "--config", str(work / "recipe.yaml"), "--data.root", str(work / "data")]
        self.command = [sys.executable, *LAUNCHERS[launcher], *options, "--run_dir", str(self.run)]
        self.agents: list[subprocess.Popen] = []

    def start_agent(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with self.log.open("ab") as log:
            self.agents.append(
                subprocess.Popen(
                    self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            )

    def rows(self) -> list[dict]:
        ledger = self.run / "metrics.jsonl"
        return list(read_rows(ledger)) if ledger.exists() else []

    def ranks(self) -> set[int]:
        """The process ids of all ranks of launchers that live."""
        found = set()
        for agent in self.agents:
            for pid in descendants(agent.pid) if agent.poll() is None else []:
                try:
                    name = Path(f"/proc/{pid}/comm").read_text()
                except OSError:
                    continue
                if name.startswith("rank "):
                    found.add(pid)
        return found

    def wait_for(self, condition: Callable[[], object]) -> float:
        """The time at which `condition` came true. Raises TransientError after `timeout_s`."""
        deadline = time.monotonic() + self.timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TransientError(f"the job did not get there within {self.timeout_s:.0f} s; see {self.log}")
            time.sleep(POLL_S)
        return time.monotonic()

    def has_trained(self, world_size: int, steps: int, starts: int) -> bool:
        """Have so many ranks done so many steps since a start, with more than `starts` starts before?"""
        rows = self.rows()
        begun = [row for row in rows if is_start(row)]
        done = [row["step"] for row in rows if row["kind"] == "train"]
        if len(begun) <= starts or begun[-1]["world_size"] != world_size or not done:
            return False
        return done[-1] >= begun[-1]["step"] + steps

    def lose_a_node(self) -> dict[str, float]:
        """Start the job, kill a launcher, and time what follows: {phase: seconds since the kill}."""
        self.start_agent()  # the first one hosts the rendezvous, and stays
        time.sleep(2)
        for _ in range(self.case.nodes - 1):
            self.start_agent()
        self.wait_for(lambda: self.has_trained(self.case.before, STEPS_BEFORE, 0))
        starts = sum(map(is_start, self.rows()))
        working = [agent for agent in self.agents[1:] if set(descendants(agent.pid)) & self.ranks()]
        lost = working[-1]
        for pid in [lost.pid, *descendants(lost.pid)]:
            send(pid, signal.SIGKILL)
        begun = time.monotonic()
        lost.wait()
        old = self.ranks()
        times = {"noticed": self.wait_for(lambda: not old & self.ranks())}
        times["new rank"] = self.wait_for(lambda: self.ranks() - old)
        times["resumed"] = self.wait_for(lambda: sum(map(is_start, self.rows())) > starts)
        times["first step"] = self.wait_for(lambda: self.has_trained(self.case.after, 1, starts))
        return {phase: at - begun for phase, at in times.items()}

    def close(self) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                for pid in [agent.pid, *descendants(agent.pid)]:
                    send(pid, signal.SIGKILL)
                agent.wait()

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepare(work: Path) -> None:
    """Data set and recipe of a small training without an end."""
    generate_tree(work / "data", Settings(classes=4, train_per_class=24, val_per_class=6, seed=1, size=64, oddities=0))
    build_index(work / "data")
    settings = recipe(100_000, "shufflenet_v2_x0_5", "cpu", "disabled")
    settings["train"] |= {"global_batch_size": GLOBAL_BATCH_SIZE, "eval_every_epochs": 1e6}
    settings["schedule"] = {"epochs": 25_000}
    settings["checkpoint"] = {"every_steps": 20, "every_minutes": None, "every_epoch": False}
    (work / "recipe.yaml").write_text(yaml.safe_dump(settings))


def facts_by_step(rows: list[dict]) -> list[tuple]:
    """(step, batch digest, learning rate) of each training row."""
    return [(row["step"], row["batch_digest"], row["lr"]) for row in rows if row["kind"] == "train"]


def reference_facts(work: Path, steps: int) -> list[tuple]:
    """Those of a run of one rank that nothing happened to."""
    run = work / "reference"
    options = ["--config", str(work / "recipe.yaml"), "--data.root", str(work / "data"), "--run_dir", str(run)]
    command = [sys.executable, "-m", "pipeline", "train", *options, "--train.max_steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TransientError(f"the run without a loss failed: {done.stderr.strip()[-500:]}")
    return facts_by_step(list(read_rows(run / "metrics.jsonl")))


def elastic(rounds: int, cases: list[Case], timeout_s: float) -> dict:
    """Print the table; the same as plain values, with every trial."""
    work = Path(tempfile.mkdtemp(prefix="bench-elastic-"))
    trials: list[dict] = []
    facts: list[list[tuple]] = []
    try:
        prepare(work)
        with Progress("bench elastic", rounds * len(cases) * len(LAUNCHERS), "trials") as progress:
            for number in range(rounds):
                for case in cases:
                    for launcher in LAUNCHERS:
                        name = f"{len(trials)}"
                        load = os.getloadavg()[0]
                        found: dict = {"case": case.name, "launcher": launcher, "round": number, "load": round(load, 2)}
                        with Trial(work, name, case, launcher, timeout_s) as trial:
                            try:
                                found |= {
                                    "seconds": {k: round(v, 2) for k, v in trial.lose_a_node().items()},
                                    "problem": None,
                                }
                            except TransientError as error:
                                found["problem"] = str(error).partition(";")[0]
                            trial.close()
                            facts.append(facts_by_step(trial.rows()))
                        trials.append(found)
                        progress.advance()
        reference = reference_facts(work, max(map(len, facts)))
        for found, seen in zip(trials, facts, strict=True):
            found["steps"], found["same_batches_and_rates"] = len(seen), seen == reference[: len(seen)]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"cores": len(os.sched_getaffinity(0)), "trials": trials, "seconds": table(trials, cases)}


def table(trials: list[dict], cases: list[Case]) -> dict:
    """Print the seconds since the kill of each phase; the same as {case: {launcher: {phase: spread}}}."""
    found: dict[str, dict] = {}
    for case in cases:
        lines, medians = {}, {}
        for launcher in LAUNCHERS:
            tried = [t for t in trials if (t["case"], t["launcher"]) == (case.name, launcher)]
            own = [trial["seconds"] for trial in tried if not trial["problem"]]
            if not own:
                lines[launcher] = "; ".join(sorted({trial["problem"] for trial in tried}))
                continue
            spreads = {phase: Spread.of([seconds[phase] for seconds in own]) for phase in PHASES}
            found.setdefault(case.name, {})[launcher] = {phase: s.as_dict(2) for phase, s in spreads.items()}
            last = spreads["first step"]
            lines[launcher] = "  ".join(f"{spreads[phase].median:10.2f}" for phase in PHASES)
            lines[launcher] += f"   ({last.minimum:.2f} to {last.maximum:.2f}, {len(own)} trials)"
            medians[launcher] = last.median
        print(f"\n{case.name}: seconds since the kill, medians")
        print(format_rows({"": "  ".join(f"{phase:>10}" for phase in PHASES), **lines}))
        if len(medians) == len(LAUNCHERS):
            print(f"  ratio {medians['pipeline launch'] / medians['torchrun']:.2f}")
    loads = [trial["load"] for trial in trials]
    same = sum(trial["same_batches_and_rates"] for trial in trials)
    print(f"\nload {min(loads)} to {max(loads)}, median {statistics.median(loads)}")
    print(f"in {same} of {len(trials)} trials: every step once, with the batches and rates of a run without a loss")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="trials of each case and launcher")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="some cases")
    parser.add_argument("--timeout", type=float, default=240.0, help="seconds after which a trial has failed")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    cases = [case for case in CASES if given.only is None or case.name in given.only]
    result = elastic(given.rounds, cases, given.timeout)
    write_result(given.json or default_path("elastic"), "elastic", ["python", *sys.argv], result)
    good = all(trial["problem"] is None and trial["same_batches_and_rates"] for trial in result["trials"])
    return EXIT_OK if good else EXIT_RETRY


if __name__ == "__main__":
    sys.exit(main())
