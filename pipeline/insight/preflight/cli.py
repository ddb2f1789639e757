"""The verb `preflight`: would this job run, and for how long? One table of checks; each passes, warns or fails.

The batch script first collects the facts of every node (`--node_facts`) and passes them as `--nodes_file`; started by
hand, the verb looks from this machine alone.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.command import importing, parse_numbers, split_options
from pipeline.config import Config, parse_config
from pipeline.counts import count
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.insight.preflight import between_nodes, check_time, checks, hardware
from pipeline.insight.preflight.check_result import FAIL, PASS, CheckResult
from pipeline.insight.preflight.node_facts import gather_facts
from pipeline.insight.preflight.qualified import check_qualified, read_qualified


@dataclass(frozen=True)
class Options:
    """Check whether a run would start, fit and finish, before its job is queued. Takes the options of `pipeline train`
    and requires no GPU. The exit code is 2 if a check fails. A run with `--train.device auto` is checked for the
    devices of this machine; give `--train.device cuda` where only the nodes of the job have GPUs."""

    world_size: int | None = None
    """Number of processes; default: the number of GPUs of this machine, or 1."""
    world_sizes: str = ""
    """Several such numbers, of which the largest that divides the global batch trains, e.g. 16,24; default: none."""
    time_limit: str = ""
    """Time limit of the job as Slurm writes it: MINUTES or [DAYS-]HH:MM:SS; default: no limit."""
    gpu_memory: float | None = None
    """Memory of each GPU in GiB; default: that of this machine's GPUs."""
    bench: str | None = None
    """A file written by `pipeline bench train --json FILE`: the speed for the time estimate until the run has measured
    its own."""
    qualified: str | None = None
    """The --out folder of `pipeline qualify` on the nodes: names a node that failed there, or is slower than the
    others."""
    node_facts: bool = False
    """Print the facts about this machine as one JSON line, for --nodes_file."""
    nodes_file: str | None = None
    """File with the facts of all nodes of the job, one line each; default: check from this machine alone."""
    run_token: str = ""
    """With --node_facts: the text that the first node wrote to .token in the run folder, which all nodes must see."""
    rendezvous: str = ""
    """With --node_facts: HOST:PORT of the first node, which all other nodes must reach."""
    signal_lead: int = 0
    """Seconds before the time limit at which the job gets its signal; default: none."""


def parse_time_limit(text: str) -> float | None:
    """Seconds of a Slurm time limit: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS; None for UNLIMITED."""
    if text.upper() in ("UNLIMITED", "INFINITE", "NOT_SET", ""):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"--time_limit {text} is not a time limit; give minutes or [DAYS-]HH:MM:SS")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    without_days: dict[int, tuple[int, ...]] = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}
    units = (3600, 60, 1) if days is not None else without_days[len(numbers)]
    seconds = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return float(int(days or 0) * 86400 + seconds)


def read_nodes(path: Path) -> list[dict]:
    """The facts that nodes wrote to a file, by name of the node; other lines in it are left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
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
        content = json.loads(path.read_text(encoding="utf-8"))
        rate, world = float(content["images_per_s"]), int(content.get("world_size", 1))
    except OSError as error:
        raise UserError(
            f"--bench {path}: {error.strerror}; give a file written by pipeline bench train --json"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--bench {path}: not a JSON object with images_per_s and world_size") from error
    if not (math.isfinite(rate) and rate > 0 and world > 0):
        raise UserError(f"--bench {path}: {rate} images/s by {count(world, 'process')}; both must be above 0")
    return rate, world


def run_checks(config: Config, nodes: list[dict], options: Options) -> Iterator[CheckResult]:
    """The results of all checks, in the order in which they are shown."""
    here = nodes[0] if nodes else gather_facts(config)
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world_size {options.world_size}: give the number of processes, 1 or more")
    gpus, data = here["gpus"], here["data"]
    world = options.world_size or len(gpus) or 1
    if options.world_sizes:
        sizes = sorted(parse_numbers("--world_sizes", options.world_sizes, "16,24,32", smallest=1))
        fitting = [size for size in sizes if config.train.global_batch_size % size == 0]
        world = (fitting or sizes)[-1]
    run_dir = Path(config.run_dir).expanduser() if config.run_dir else None
    recipe = checks.check_recipe(config, world, checks.device_type(config, len(gpus)), data.get("classes"))
    yield recipe
    yield checks.check_versions(here, config)
    yield hardware.check_gpus(nodes or [here], config)
    yield hardware.check_open_files(nodes or [here], world)
    if nodes or "SLURM_JOB_NUM_NODES" in os.environ:
        yield checks.check_nodes(nodes, int(os.environ.get("SLURM_JOB_NUM_NODES", len(nodes))))
    if options.qualified:
        found = read_qualified(Path(options.qualified).expanduser())
        yield check_qualified(found, [node["node"] for node in nodes])
    yield checks.check_data(data, config)
    yield from check_time.check_schedule(config, data)
    yield from checks.check_run_folder(run_dir, here["run_folder"], config, data)
    yield checks.check_wandb(config)
    smallest = min((gpu["memory_mib"] for gpu in gpus if gpu["memory_mib"] is not None), default=None)
    memory_mib = options.gpu_memory * 1024 if options.gpu_memory else smallest
    if recipe.level != FAIL:
        yield checks.check_memory(config, world, data.get("classes"), memory_mib)
    bench = read_bench(Path(options.bench).expanduser()) if options.bench else None
    limit_s = parse_time_limit(options.time_limit)
    yield check_time.check_time(run_dir, config, world, data, limit_s, bench)
    if limit_s is not None and limit_s <= options.signal_lead:
        yield check_time.check_signal_lead(limit_s, options.signal_lead)


def probe_together(config: Config, options: Options) -> dict[str, str | None]:
    """What this node sees of the others: {shared_folder, network}, each a problem or None."""
    node, count = int(os.environ.get("SLURM_NODEID", 0)), int(os.environ.get("SLURM_NNODES", 1))
    host, _, port = options.rendezvous.rpartition(":")
    found: dict[str, str | None] = {"shared_folder": None, "network": None}
    if port and count > 1:
        found["network"] = between_nodes.probe_rendezvous(host, int(port), node == 0, count - 1)
    if options.run_token and config.run_dir:
        run_dir = Path(config.run_dir).expanduser()
        found["shared_folder"] = between_nodes.probe_token(run_dir, options.run_token, host)
    return found


def render_table(results: list[CheckResult]) -> str:
    """One row for each check: its level, its name, and what was seen or what to do."""
    width = max(len(result.name) for result in results)
    return "\n".join(f"{result.level:<5} {result.name:<{width}}  {result.text}" for result in results)


def main(argv: list[str]) -> int:
    options, rest = split_options(Options, "preflight", argv)
    config = parse_config(rest, "preflight", Options)
    if options.node_facts:
        print(json.dumps(gather_facts(config) | probe_together(config, options)), flush=True)
        return EXIT_OK
    nodes = read_nodes(Path(options.nodes_file)) if options.nodes_file else []
    with importing():
        results = list(run_checks(config, nodes, options))
    print(render_table(results), flush=True)
    failed = sum(result.level == FAIL for result in results)
    if failed:
        print(f"preflight: {failed} of {len(results)} checks failed", file=sys.stderr)
        return EXIT_USER
    warned = sum(result.level != PASS for result in results)
    print(f"preflight: {len(results) - warned} checks passed, {warned} warned")
    return EXIT_OK
