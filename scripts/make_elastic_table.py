"""Write the figures of benchmarks/elastic.py into docs/performance.md, from the files that it has written."""

import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.insight.chaos.tries import count_good

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/performance.md"
TRIALS, TRIES = ROOT / "benchmarks/elastic.json", ROOT / "benchmarks/elastic_tries.json"
BEGIN, END = "<!-- losing nodes: written by scripts/make_elastic_table.py -->\n\n", "\n<!-- end -->"
PHASES = ("noticed", "new rank", "resumed", "first step")


def trials_table(made: dict) -> str:
    """The seconds by phase, medians."""
    trials = made["result"]["trials"]
    lines = [
        "| case | launcher | trials | loss noticed | new rank runs | checkpoint loaded | first step | steps again |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, launcher in dict.fromkeys((trial["case"], trial["launcher"]) for trial in trials):
        own = [trial for trial in trials if (trial["case"], trial["launcher"]) == (case, launcher)]
        good = [trial for trial in own if not trial["problem"]]
        cells = [f"{len(good)} of {len(own)}"]
        for phase in PHASES:
            seconds = [trial["seconds"][phase] for trial in good]
            spread = f" ({min(seconds):.1f} to {max(seconds):.1f})" if len(seconds) > 1 and phase == PHASES[-1] else ""
            cells.append(f"{statistics.median(seconds):.1f}{spread}" if seconds else "")
        again = [trial["steps_again"] for trial in good]
        cells.append(" to ".join(map(str, sorted({min(again), max(again)}))) if again else "")
        lines.append(f"| {case} | {launcher} | {' | '.join(cells)} |")
    loads = sorted({f"{trial['load']:.1f}" for trial in trials}, key=float)
    single = [] if len(loads) > 1 else ["**At a single load: times at others are not known.**"]
    machine = made["machine"]
    same = sum(trial["same_batches_and_rates"] for trial in trials)
    weights = [trial["same_weights"] for trial in trials if "same_weights" in trial]
    lines += [
        "",
        *single,
        f"`{made['command']}`",
        f"([raw](../benchmarks/{TRIALS.name})). {machine['processor']}, {made['result']['cores']} cores, "
        f"load {' to '.join(dict.fromkeys((loads[0], loads[-1])))}, {made['time'][:10]}.",
        "Every step once, with the batches and learning rates of a run without a loss:",
        f"{same} of {len(trials)} trials. With a spare, fp32, also its weights and optimizer",
        f"state, bit for bit: {sum(weights)} of {len(weights)}.",
    ]
    return "\n".join(lines) + "\n"


def tries_text(made: dict) -> str:
    """How many losses of a busy job went well."""
    result = made["result"]
    seconds = sorted(second for kind in result["seconds"].values() for second in kind)
    if not seconds:
        raise SystemExit(f"{TRIES}: no try went well, so there is no time to show; measure again")
    load = made["machine"]["load"][2]
    lines = [
        "",
        f"A busy machine ({made['machine']['cores']} cores, load {load:.0f} over 15 minutes):",
        f"{result['tries']} times a node of a running job was killed, or frozen",
        "until the others trained without it. Nothing but that node was lost,",
        f"and no second world trained, in {count_good(result)} of them. From the loss to the first new step: median",
        f"{statistics.median(seconds):.1f} s, at most {math.ceil(10 * seconds[-1]) / 10:.1f}.",
        f"`{made['command']}` ([raw](../benchmarks/{TRIES.name}))",
    ]
    return "\n".join([*lines, *(f"- {problem}" for problem in result["problems"])]) + "\n"


def section(page: str) -> str:
    """The page with the figures of the committed files."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{PAGE}: the lines {BEGIN.strip()!r} and {END.strip()!r} must be there once each")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    text = trials_table(json.loads(TRIALS.read_text()))
    if TRIES.exists():
        text += tries_text(json.loads(TRIES.read_text()))
    return f"{before}{BEGIN}{text}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(section(PAGE.read_text()))
