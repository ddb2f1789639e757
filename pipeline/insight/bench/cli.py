"""The verb `bench`: runs one bench, prints its result as a table and writes it as JSON."""

import functools
import importlib
from pathlib import Path
from typing import Any

from pipeline.command import close_to, run_command, verb_page
from pipeline.errors import EXIT_OK, UserError
from pipeline.insight.bench.results import default_path, write_result

#: name -> what it measures; its module of the same name has a function of the same name that returns a dictionary
BENCHES = {
    "loader": "CPU time of an image: DALI and reference decoder, image tree and shards",
    "step": "the training loop against a bare PyTorch loop; on a GPU also precisions and a roofline",
    "train": "a whole run: is data, compute, communication or checkpointing the bottleneck?",
    "checkpoint": "how long a step waits for a checkpoint, and the writing in the background",
    "overlap": "how much of the gradient exchange overlaps with computation, from a trace of --train.profile_steps",
    "io": "reading the data set's files and shards, without decoding",
}


def usage() -> str:
    table = verb_page("pipeline bench", "WHAT", BENCHES)
    return f"{table}\n\nEach prints a table and writes it as JSON into runs/bench, or to --json FILE."


def take_json(argv: list[str], name: str) -> tuple[Path, list[str]]:
    """The file for the result, and the other arguments. Raises UserError for --json without a file."""
    argv = [part for item in argv for part in (item.split("=", 1) if item.startswith("--json=") else [item])]
    if "--json" not in argv:
        return default_path(name), argv
    at = argv.index("--json")
    if at + 1 == len(argv):
        raise UserError("--json: give the file for the result")
    return Path(argv[at + 1]).expanduser(), argv[:at] + argv[at + 2 :]


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return EXIT_OK
    name, *rest = argv
    if name not in BENCHES:
        close = close_to(name, BENCHES)
        raise UserError(f"no bench '{name}'; {f'did you mean {close}?' if close else 'one of: ' + ', '.join(BENCHES)}")
    path, rest = take_json(rest, name)
    module = importlib.import_module(f"pipeline.insight.bench.{name}")
    results: list[dict | None] = []

    if hasattr(module, "main"):  # takes the options of `train`
        results.append(module.main(rest))
    else:
        bench = getattr(module, name)

        @functools.wraps(bench)
        def run(**options: Any) -> None:
            results.append(bench(**options))

        run_command(run, f"bench {name}", rest)
    if results and results[0]:
        write_result(path, name, ["python", "-m", "pipeline", "bench", *argv], results[0])
    return EXIT_OK
