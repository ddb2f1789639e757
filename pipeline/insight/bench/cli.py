"""The verb `bench`: which bench is meant; its result as a table and as JSON."""

import functools
import importlib
import json
import shlex
import time
from pathlib import Path

from pipeline.command import run_command
from pipeline.errors import EXIT_OK, UserError

#: name -> what it measures; its module of the same name has a function of the same name that returns a dictionary
BENCHES = {
    "loader": "CPU time an image, beside torchvision's, timm's and FFCV's loaders",
    "step": "the training loop beside a bare PyTorch loop; precisions; a roofline on a GPU",
    "train": "a whole run: is it data, compute, communication or checkpointing that holds it back?",
    "checkpoint": "how long a step waits for a checkpoint, and the writing behind it",
    "startup": "from the start of the process to the first step, part by part",
    "overlap": "how much of the gradients' exchange hides behind computing, from a trace of --train.profile_steps",
    "io": "reading the data set's files and shards, without decoding",
}


def usage() -> str:
    width = max(map(len, BENCHES))
    lines = ["usage: pipeline bench WHAT [options]        (pipeline bench WHAT --help for its options)", ""]
    lines += [f"  {name:<{width}}  {about}" for name, about in BENCHES.items()]
    return "\n".join([*lines, "", "Each prints a table and writes it as JSON into runs/bench; --json FILE: elsewhere."])


def take_json(argv: list[str], name: str) -> tuple[Path, list[str]]:
    """Where the result goes, and the other arguments."""
    argv = [part for item in argv for part in (item.split("=", 1) if item.startswith("--json=") else [item])]
    if "--json" not in argv:
        return Path("runs/bench") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json", argv
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
        raise UserError(f"no bench '{name}'; one of: {', '.join(BENCHES)}")
    path, rest = take_json(rest, name)
    module = importlib.import_module(f"pipeline.insight.bench.{name}")
    results: list[dict] = []

    if hasattr(module, "main"):  # takes the options of `train`
        results.append(module.main(rest))
    else:
        bench = getattr(module, name)

        @functools.wraps(bench)
        def run(**options) -> None:
            results.append(bench(**options))

        run_command(run, f"bench {name}", rest)
    if results and results[0]:
        write_result(path, name, argv, results[0])
    return EXIT_OK


def write_result(path: Path, name: str, argv: list[str], result: dict) -> None:
    """The result beside its command, machine and versions, as JSON."""
    from pipeline.insight.bench.machine import describe_machine

    page = {
        "bench": name,
        "command": shlex.join(["python", "-m", "pipeline", "bench", *argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine(),
        **{name: result[name] for name in ("images_per_s", "world_size") if name in result},  # for preflight
        "result": result,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(page, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} can't be written ({error.strerror}); give another file") from error
    print(f"\n{path}", flush=True)
