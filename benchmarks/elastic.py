"""How long a job stands still after a node is lost: `pipeline launch` beside torchrun's defaults, phase by phase.

    python benchmarks/elastic.py [--rounds 3] [--torchrun-rounds 1] [--minutes 7.5] [--json FILE]
    python benchmarks/elastic.py --tries 50 [--load 4] [--minutes 30] [--json FILE]

Each launcher on this machine stands for a node with one rank on the CPU. One is killed (SIGKILL, with all that it has
started); the seconds from there count until the ranks that are left have ended (the loss is noticed), until the first
new rank runs (rendezvous and start of the process), until the checkpoint is loaded, and until the first new step is in
the ledger; also how many steps are done again. Launchers take turns in the rounds that both have; torchrun's defaults
wait for about 45 s after each loss, so it has fewer. After each trial the ledger must have every step once, with the
batch digests and learning rates of a run without a loss; where the number of ranks stays the same, the checkpoint at
the end must be that run's, bit for bit (fp32: with another number of ranks, sums are rounded in another order).

With --tries nodes of a running job are killed or frozen again and again, with busy processes beside it; the count of
tries in which the world split, or another node was lost, is printed.
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import EXIT_OK, EXIT_RETRY, TransientError
from pipeline.insight.bench.interleaved import Spread, format_rows
from pipeline.insight.bench.results import default_path, write_result
from pipeline.insight.chaos.compare import differences
from pipeline.insight.chaos.nodes import (
    LAUNCHERS,
    OURS,
    TORCHRUN,
    NodeJob,
    prepare,
    ranks_of,
)
from pipeline.insight.chaos.tries import count_good, lose_nodes
from pipeline.progress import Progress
from pipeline.run_paths import RunPaths, list_checkpoints
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.run_folder.checkpoint import load_state
from pipeline.training.run_folder.manifest import verify_checkpoint

STEPS_BEFORE = 30  # with all nodes, before one is killed
STEPS_AFTER = 3
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


def lose_a_node(job: NodeJob, case: Case) -> dict:
    """Start the job, kill a launcher, and time what follows: seconds since the kill by phase, and steps done again."""
    job.add_node()  # the first one hosts the rendezvous, and stays
    job.wait_for(job.is_open, "rendezvous")
    for _ in range(case.nodes - 1):
        job.add_node()
    job.wait_for(lambda: job.has_trained(0, STEPS_BEFORE, case.before), f"{STEPS_BEFORE} steps")
    starts, old = len(job.starts()), job.ranks()
    lost = next(node for node in reversed(job.nodes[1:]) if ranks_of(node))
    job.kill(lost)
    begun, done = time.monotonic(), job.last_step()

    def time_of(condition: Callable[[], object], what: str) -> float:
        job.wait_for(condition, what)
        return time.monotonic()

    times = {"noticed": time_of(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old), "end of old ranks")}
    times["new rank"] = time_of(lambda: job.ranks().keys() - old, "new rank")
    times["resumed"] = time_of(lambda: len(job.starts()) > starts, "resumed run")
    times["first step"] = time_of(lambda: job.has_trained(starts, 1, case.after), "step without the lost node")
    job.wait_for(lambda: job.has_trained(starts, STEPS_AFTER, case.after), "further step")
    again = max(0, done - job.starts()[starts]["step"])
    job.stop()
    return {"seconds": {phase: round(at - begun, 2) for phase, at in times.items()}, "steps_again": again}


def facts_by_step(run: Path) -> list[tuple]:
    """(step, batch digest, learning rate) of each training row."""
    ledger = RunPaths(run).ledger
    rows = read_rows(ledger) if ledger.exists() else []
    return [(row["step"], row["batch_digest"], row["lr"]) for row in rows if row["kind"] == "train"]


def reference_run(work: Path, steps: int) -> Path:
    """A run of two nodes that nothing happened to, with a checkpoint after every step. As many threads a rank as in the
    trials, since sums depend on it."""
    keep = ("--checkpoint.every_steps", "1", "--checkpoint.keep", str(steps), "--train.max_steps", str(steps))
    with NodeJob(work, "reference", "2", training=keep) as job:
        for _ in range(2):
            job.add_node()
        job.wait_for(RunPaths(job.run).finished.exists, "end of the run without a loss")
    return job.run


def differing_tensors(run: Path, reference: Path) -> list[str]:
    """The tensors of the newest checkpoint that are not those of the reference at that step, bit for bit."""
    found = list_checkpoints(RunPaths(run).checkpoints)
    if not found:
        return ["no checkpoint"]
    step, path = found[0]
    verify_checkpoint(path)
    return differences(load_state(path), load_state(RunPaths(reference).checkpoint(step)))


def elastic(given: argparse.Namespace, cases: list[Case], work: Path) -> dict:
    """Print the table; the same as plain values, with every trial."""
    trials: list[dict] = []
    took: dict[tuple[str, str], float] = {}  # the longest trial
    begun, planned = time.monotonic(), []
    for number in range(given.rounds):
        for case in cases:
            planned += [
                (number, case, launcher) for launcher in (OURS, TORCHRUN)[: 1 + (number < given.torchrun_rounds)]
            ]
    skipped = 0
    with Progress("bench elastic", len(planned), "trials") as progress:
        for number, case, launcher in planned:
            now = time.monotonic()
            own = [seconds for (_, other), seconds in took.items() if other == launcher]
            if now - begun + took.get((case.name, launcher), max(own, default=0.0)) > 60 * given.minutes - 45:
                skipped += 1  # the reference run comes after
                continue
            found: dict = {"case": case.name, "launcher": launcher, "round": number, "problem": None}
            found["load"] = round(os.getloadavg()[0], 2)
            with NodeJob(work, f"{len(trials)}", case.nnodes, launcher, given.timeout) as job:
                try:
                    found |= lose_a_node(job, case)
                except TransientError as error:
                    found["problem"] = str(error)
            trials.append(found)
            took[case.name, launcher] = max(took.get((case.name, launcher), 0.0), time.monotonic() - now)
            progress.advance()
    if not trials:
        raise SystemExit(f"--minutes {given.minutes:g} is too short for a trial; give more")
    facts = [facts_by_step(work / f"{number}") for number in range(len(trials))]
    longest = max(map(len, facts))
    reference = reference_run(work, longest) if longest else work
    expected = facts_by_step(reference)
    for number, (found, seen) in enumerate(zip(trials, facts, strict=True)):
        case = next(case for case in cases if case.name == found["case"])
        found["steps"], found["same_batches_and_rates"] = len(seen), seen == expected[: len(seen)]
        if case.before == case.after == 2 and not found["problem"]:
            differing = differing_tensors(work / f"{number}", reference)
            found |= {"same_weights": not differing, "differing_tensors": differing[:5]}
    seconds = table(trials, cases)
    if skipped:
        print(f"{skipped} of {len(planned)} trials were left out, as {given.minutes:g} minutes are over")
    facts_of_machine = {"cores": len(os.sched_getaffinity(0)), "minutes": round((time.monotonic() - begun) / 60, 1)}
    return facts_of_machine | {"trials": trials, "left_out": skipped, "seconds": seconds}


def table(trials: list[dict], cases: list[Case]) -> dict:
    """Print the seconds since the kill of each phase; the same as {case: {launcher: {phase: spread}}}."""
    found: dict[str, dict] = {}
    for case in cases:
        lines, medians = {}, {}
        for launcher in LAUNCHERS:
            tried = [t for t in trials if (t["case"], t["launcher"]) == (case.name, launcher)]
            good = [trial for trial in tried if not trial["problem"]]
            if not good:
                lines[launcher] = "; ".join(sorted({trial["problem"] for trial in tried})) or "not tried"
                continue
            spreads = {phase: Spread.of([trial["seconds"][phase] for trial in good]) for phase in PHASES}
            found.setdefault(case.name, {})[launcher] = {phase: s.as_dict(2) for phase, s in spreads.items()}
            last, again = spreads["first step"], sorted(trial["steps_again"] for trial in good)
            lines[launcher] = "  ".join(f"{spreads[phase].median:10.2f}" for phase in PHASES)
            lines[launcher] += f"   ({last.minimum:.2f} to {last.maximum:.2f}, {len(good)} of {len(tried)} trials; "
            lines[launcher] += f"steps again: {again[0]} to {again[-1]})"
            medians[launcher] = last.median
        print(f"\n{case.name}: seconds since the kill, medians")
        print(format_rows({"": "  ".join(f"{phase:>10}" for phase in PHASES), **lines}))
        if len(medians) == len(LAUNCHERS):
            print(f"  ratio {medians[OURS] / medians[TORCHRUN]:.2f}")
    loads = [trial["load"] for trial in trials]
    print(f"\nload {min(loads)} to {max(loads)}, median {statistics.median(loads)}")
    for launcher in LAUNCHERS:
        own = [trial for trial in trials if trial["launcher"] == launcher]
        same = sum(trial["same_batches_and_rates"] for trial in own)
        weights = [trial["same_weights"] for trial in own if "same_weights" in trial]
        print(f"{launcher}: every step once, with the batches and rates of a run without a loss: {same} of {len(own)}")
        print(f"  with a spare, weights and optimizer state bit for bit, too: {sum(weights)} of {len(weights)}")
    return found


def is_good(trial: dict) -> bool:
    """Did it go on, as the run that nothing happened to?"""
    return trial["problem"] is None and trial["same_batches_and_rates"] and trial.get("same_weights", True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="trials of each case with pipeline launch")
    parser.add_argument("--torchrun-rounds", type=int, default=1, help="rounds in which torchrun takes turns with it")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="some cases")
    parser.add_argument("--tries", type=int, help="lose so many nodes of a busy machine instead")
    parser.add_argument("--load", type=int, default=4, help="busy processes beside the tries")
    parser.add_argument("--seed", type=int, default=0, help="of the tries")
    parser.add_argument("--minutes", type=float, default=7.5, help="no trial or try begins that would end later")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a trial has failed")
    parser.add_argument("--json", type=Path, help="file for the result")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_RETRY))  # nothing is left running
    work = Path(tempfile.mkdtemp(prefix="bench-elastic-"))
    try:
        prepare(work)
        if given.tries:
            result = lose_nodes(work, given.tries, given.load, given.seed, 60 * given.minutes, given.timeout)
            print("\n".join(["", *result["problems"]]))
            print(f"{count_good(result)} of {result['tries']} tries: no split world, no other node lost")
            good = bool(result["tries"]) and not result["problems"]
        else:
            cases = [case for case in CASES if given.only is None or case.name in given.only]
            result = elastic(given, cases, work)
            good = all(map(is_good, result["trials"]))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_result(given.json or default_path("elastic"), "elastic", ["python", *sys.argv], result)
    return EXIT_OK if good else EXIT_RETRY


if __name__ == "__main__":
    sys.exit(main())
