"""The verb `preflight`: would this job run, and for how long? One table of checks, each passed, warned about or failed.

The batch script asks every node for its facts first and hands them over; by hand it looks from this machine alone.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config, parse_config
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.imports import importing
from pipeline.insight.preflight import checks
from pipeline.insight.preflight.checks import FAIL, PASS, Finding
from pipeline.insight.preflight.node_facts import gather_facts

ABOUT = """usage: pipeline preflight --config NAME_OR_FILE --data.root DIR --run_dir DIR [options of train] [these]

Would this job run? Takes what `pipeline train` takes, and needs no GPU. Exit code 2 if a check fails.

  --world_size N       processes in all (default: the GPUs of this machine, or 1)
  --time_limit T       of the job, as Slurm writes it: MINUTES, [DAYS-]HH:MM:SS (default: none)
  --gpu_memory GIB     memory of each GPU (default: of this machine's GPUs)
  --bench FILE         JSON with images_per_s, and world_size if not 1, as `pipeline bench train --json FILE` writes it:
                       the speed for the time estimate until the run has measured its own
  --node_facts         print this machine's facts as a JSON line, for --nodes_file
  --nodes_file FILE    facts of all the nodes of the job, a line each (default: look from this machine alone)

Options of train, which apply here too:
"""


def parse_time_limit(text: str) -> float | None:
    """Seconds of a Slurm time limit: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS; None for UNLIMITED."""
    if text.upper() in ("UNLIMITED", "INFINITE", "NOT_SET", ""):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"--time_limit {text} is no time limit; give minutes or [DAYS-]HH:MM:SS")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        units = (3600, 60, 1)
    else:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    seconds = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return float(int(days or 0) * 86400 + seconds)


def read_nodes(path: Path) -> list[dict]:
    """The facts that nodes wrote to a file, by name of the node; other lines in it are left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"--nodes_file {path}: {error.strerror}") from error
    facts = []
    for line in lines:
        if line.startswith('{"node"'):
            try:
                facts.append(json.loads(line))
            except ValueError:
                continue
    return sorted(facts, key=lambda node: node["node"])


def read_bench(path: Path) -> tuple[float, int]:
    """(images/s of all processes together, their number) of a bench file. Raises UserError."""
    try:
        content = json.loads(path.read_text())
        rate, world = float(content["images_per_s"]), int(content.get("world_size", 1))
    except OSError as error:
        raise UserError(f"--bench {path}: {error.strerror}; give the file that a bench wrote") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--bench {path}: no JSON object with images_per_s and world_size") from error
    if not (math.isfinite(rate) and rate > 0 and world > 0):
        raise UserError(f"--bench {path}: {rate} images/s by {world} processes; both must be above 0")
    return rate, world


def find(config: Config, nodes: list[dict], options: argparse.Namespace) -> Iterator[Finding]:
    """All findings, in the order in which they are shown."""
    here = nodes[0] if nodes else gather_facts(config)
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world_size {options.world_size}: give the number of processes, 1 or more")
    world = options.world_size or len(here["gpus"]) or 1
    run_dir = Path(config.run_dir).expanduser() if config.run_dir else None
    recipe = checks.check_recipe(config, world)
    yield recipe
    yield checks.check_versions(here, config)
    yield checks.check_gpus(here, config)
    if nodes or "SLURM_JOB_NUM_NODES" in os.environ:
        yield checks.check_nodes(nodes, int(os.environ.get("SLURM_JOB_NUM_NODES", len(nodes))))
    yield checks.check_data(here["data"], config)
    yield from checks.check_run_folder(run_dir, here["run_folder"], config, here["data"])
    yield checks.check_wandb(config)
    memory = (
        options.gpu_memory * 1024 if options.gpu_memory else min((g["memory_mib"] for g in here["gpus"]), default=None)
    )
    if recipe.level != checks.FAIL:
        yield checks.check_memory(config, world, here["data"].get("classes"), memory)
    bench = read_bench(Path(options.bench).expanduser()) if options.bench else None
    yield checks.check_time(run_dir, config, world, here["data"], parse_time_limit(options.time_limit), bench)


def table(findings: list[Finding]) -> str:
    """A row for each finding: result, what was looked at, and what was seen or is to be done."""
    width = max(len(finding.about) for finding in findings)
    return "\n".join(f"{finding.level:<5} {finding.about:<{width}}  {finding.text}" for finding in findings)


def main(argv: list[str]) -> int:
    own = argparse.ArgumentParser(prog="pipeline preflight", add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--world_size", "--world-size", type=int)
    own.add_argument("--time_limit", "--time-limit", default="")
    own.add_argument("--gpu_memory", "--gpu-memory", type=float)
    own.add_argument("--bench")
    own.add_argument("--node_facts", "--node-facts", action="store_true")
    own.add_argument("--nodes_file", "--nodes-file")
    try:
        options, rest = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if {"-h", "--help"} & set(rest):
        print(ABOUT)
    config = parse_config(rest, "preflight")
    if options.node_facts:
        print(json.dumps(gather_facts(config)), flush=True)
        return EXIT_OK
    nodes = read_nodes(Path(options.nodes_file)) if options.nodes_file else []
    with importing():
        findings = list(find(config, nodes, options))
    print(table(findings), flush=True)
    failed = [finding for finding in findings if finding.level == FAIL]
    if failed:
        print(f"preflight: {len(failed)} of {len(findings)} checks failed", file=sys.stderr)
        return EXIT_USER
    warned = sum(finding.level != PASS for finding in findings)
    print(f"preflight: {len(findings) - warned} checks passed, {warned} warned")
    return EXIT_OK
