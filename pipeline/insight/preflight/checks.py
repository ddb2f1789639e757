"""The checks of `preflight`: each looks at one thing, and reports in one line what it saw or what to do."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config import Config, semantic_config
from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.insight.preflight.check_result import FAIL, PASS, WARN, CheckResult
from pipeline.insight.preflight.node_facts import nearest_existing
from pipeline.insight.status.run_state import (
    newest_checkpoint,
    read_marker,
)
from pipeline.run_paths import RunPaths
from pipeline.tracking.wandb_settings import find_problem, is_installed, plan_wandb
from pipeline.training.run_folder.lock import RunLock


def device_type(config: Config, gpus: int) -> str:
    """ "cuda" or "cpu": what a rank of this run computes with on a machine that has this many GPUs."""
    wants_gpu = config.train.device == "cuda" or (config.train.device == "auto" and gpus > 0)
    return "cuda" if wants_gpu else "cpu"


def check_recipe(config: Config, world_size: int, device: str, data_classes: int | None = None) -> CheckResult:
    """Can this run be trained? The same rules as `pipeline train`: see `pipeline.training.validate`."""
    from pipeline.training.validate import validate

    try:
        validate(config, world_size, device, data_classes)
    except UserError as error:
        return CheckResult(FAIL, "recipe", str(error))
    batch = config.train.global_batch_size
    local, micro = config.train.local_batch_size(world_size), config.train.local_micro_batch_size(world_size)
    text = f"{config.model.name}, global batch {batch} over {world_size} process{'es' if world_size > 1 else ''}"
    if micro < 2 and config.train.micro_batch_size != 1:
        return CheckResult(
            WARN, "recipe", f"{text}: with 1 image each, BatchNorm has little to average; use fewer processes"
        )
    return CheckResult(PASS, "recipe", f"{text}: {local} each" + (f", {micro} at once" if micro < local else ""))


def check_versions(node: dict, config: Config) -> CheckResult:
    """Is what the run needs installed?"""
    found = {name: version for name, version in node["versions"].items() if version}
    if node["driver"]:
        found["driver"] = node["driver"]
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    missing = [name for name in ("torch", "torchvision") if name not in found]
    if missing:
        return CheckResult(
            FAIL, "versions", f"{text}: {' and '.join(missing)} missing; is PYTHON the right interpreter?"
        )
    if "DALI" not in found and config.data.loader == "dali":
        return CheckResult(
            FAIL, "versions", f"{text}: no DALI; install nvidia-dali-cuda120, or give --data.loader reference"
        )
    if "DALI" not in found and config.data.loader == "auto":
        return CheckResult(WARN, "versions", f"{text}: no DALI, so images are decoded by the slower reference loader")
    return CheckResult(PASS, "versions", text)


def check_nodes(nodes: list[dict], expected: int) -> CheckResult:
    """Do all nodes see the same data, folder and versions?"""
    problems = []
    if len(nodes) < expected:
        problems.append(f"{len(nodes)} of {expected} nodes answered")
    first = nodes[0] if nodes else {}
    for node in nodes:
        if node["data"]["problem"]:
            problems.append(f"{node['node']}: {node['data']['problem']}")
        for problem in ("run_folder", "shared_folder", "network"):
            if node.get(problem):
                problems.append(f"{node['node']}: {node[problem]}")
        if node["data"]["fingerprint"] != first["data"]["fingerprint"]:
            problems.append(f"{node['node']} sees another data set than {first['node']}")
        differing = [name for name, version in node["versions"].items() if version != first["versions"].get(name)]
        if differing:
            there = ", ".join(f"{name} {node['versions'][name]}" for name in differing)
            problems.append(f"{node['node']} has {there}, unlike {first['node']}")
        if len(node["gpus"]) != len(first["gpus"]):
            problems.append(
                f"{node['node']} has {count(len(node['gpus']), 'GPU')}, {first['node']} has {len(first['gpus'])}"
            )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        return CheckResult(FAIL, "nodes", "; ".join(problems[:3]) + more)
    slowest = max((node["data"]["read_s"] or 0.0, node["node"]) for node in nodes)
    text = f"{len(nodes)} nodes agree" if len(nodes) > 1 else "1 node"
    if slowest[0] and len(nodes) == 1:
        text += f"; a few samples were read ({slowest[0]:.2f} s)"
    elif slowest[0]:
        text += f"; a few samples were read everywhere, slowest on {slowest[1]} ({slowest[0]:.2f} s)"
    return CheckResult(PASS, "nodes", text)


def check_data(facts: dict, config: Config) -> CheckResult:
    """Is the data set there and complete? A sample of it is checked, in seconds."""
    if facts["problem"]:
        return CheckResult(FAIL, "data", facts["problem"])
    if not facts["indexed"]:
        return CheckResult(
            WARN,
            "data",
            f"no index, so the run would first scan all images; build it first: pipeline index {config.data.root}",
        )
    from pipeline.training.validate import data_warnings

    counts = " + ".join(f"{number:,} {name}" for name, number in facts["images"].items())
    shards = count(facts["shards"], "shard") if facts["shards"] else "no shards"
    text = f"{counts} images, {count(facts['classes'], 'class')}, {shards}, {facts['fingerprint'][:12]}"
    images, batch = facts["images"].get("train", 0), config.train.global_batch_size
    warnings = [f"left out of {facts['left_out']}"] if facts.get("left_out") else []
    warnings += facts.get("nested", [])
    warnings += data_warnings(images, batch, facts["classes"], facts["unscored"])
    return CheckResult(WARN if warnings else PASS, "data", "; ".join([text, *warnings]))


def check_run_folder(run_dir: Path | None, problem: str | None, config: Config, data: dict) -> Iterator[CheckResult]:
    """Can the run folder be written, is what it holds from this recipe, and is there room for its checkpoints?"""
    if run_dir is None:
        yield CheckResult(FAIL, "run folder", "--run_dir is missing: give the run's folder")
        return
    if problem:
        yield CheckResult(FAIL, "run folder", f"{problem}; give another --run_dir")
        return
    in_use = RunLock(run_dir, say=lambda _: None).owner()
    if in_use:
        level = FAIL if "SLURM_JOB_ID" in os.environ else WARN
        yield CheckResult(
            level, "run folder", f"{run_dir} is in use by host {in_use}; wait for it, or give another --run_dir"
        )
        return
    checkpoint = newest_checkpoint(run_dir)
    yield _check_same_recipe(run_dir, config, data, checkpoint)
    yield _check_space(run_dir, config, data, checkpoint)


def _check_same_recipe(run_dir: Path, config: Config, data: dict, checkpoint: tuple[int, float] | None) -> CheckResult:
    from pipeline.training.run_folder.folder import RunFolder
    from pipeline.training.run_folder.manifest import DamagedCheckpoint, read_meta
    from pipeline.training.run_folder.same_recipe import check_fingerprints

    try:
        RunFolder(run_dir).check_recipe(config)
        if checkpoint is not None and data["fingerprint"]:
            path = RunPaths(run_dir).checkpoint(checkpoint[0])
            check_fingerprints(path, read_meta(path), semantic_config(config), data["fingerprint"], config.given)
    except UserError as error:
        return CheckResult(FAIL, "run folder", str(error))
    except DamagedCheckpoint as error:
        return CheckResult(WARN, "run folder", f"{error}; an older checkpoint will be used if there is one")
    if read_marker(run_dir, "finished") is not None:
        return CheckResult(PASS, "run folder", f"{run_dir}: finished; nothing is left to do")
    if checkpoint is None:
        return CheckResult(PASS, "run folder", f"{run_dir}: starts at step 0")
    return CheckResult(PASS, "run folder", f"{run_dir}: resumes from step {checkpoint[0]:,}")


def _check_space(run_dir: Path, config: Config, data: dict, checkpoint: tuple[int, float] | None) -> CheckResult:
    if checkpoint is not None:
        files = RunPaths(run_dir).checkpoint(checkpoint[0]).iterdir()
        size = sum(file.stat().st_size for file in files)
    else:
        try:
            size = estimate_checkpoint(config, data.get("classes") or 1000)
        except UserError as error:
            return CheckResult(FAIL, "disk space", f"unknown: {error}")
    copies = config.checkpoint.keep + 2  # the best one, and one that is being written
    needed, free = copies * size, shutil.disk_usage(nearest_existing(run_dir)).free
    text = f"{copies} checkpoints of {size / 1e6:,.0f} MB need {needed / 1e9:.1f} GB, {free / 1e9:,.1f} GB are free"
    if free < needed:
        return CheckResult(FAIL, "disk space", f"{text}; free some, lower --checkpoint.keep, or give another --run_dir")
    return CheckResult(PASS, "disk space", text)


def estimate_checkpoint(config: Config, classes: int) -> int:
    """Bytes of a checkpoint of the run."""
    from pipeline.insight.estimate.memory import checkpoint_bytes
    from pipeline.model.build import build_model
    from pipeline.model.meta_init import meta_init

    with meta_init():
        model = build_model(config.model, config.model.num_classes or classes)
    return checkpoint_bytes(model, config)


def check_wandb(config: Config) -> CheckResult:
    """Where are metrics sent?"""
    plan = plan_wandb(config.tracking)
    why = f" ({plan.why})" if plan.why else ""
    if plan.mode == "disabled":
        return CheckResult(PASS, "W&B", f"disabled{why}; all metrics are in metrics.jsonl")
    if not is_installed():
        return CheckResult(WARN, "W&B", "not installed; all metrics are in metrics.jsonl")
    if plan.mode == "offline":
        return CheckResult(PASS, "W&B", f"offline{why}: upload later with: wandb sync")
    if not plan.key:
        return CheckResult(FAIL, "W&B", "online, but there is no key: wandb login, or --tracking.wandb offline")
    problem = find_problem(plan)
    where = f"project {plan.project} at {plan.url}"
    if problem is not None:
        return CheckResult(WARN, "W&B", f"online, {where}: the server {problem} from here; a run would go on offline")
    return CheckResult(PASS, "W&B", f"online{why}, {where}")


def check_memory(config: Config, world_size: int, classes: int | None, card_mib: float | None) -> CheckResult:
    """Does a step fit into the GPU's memory? An estimate. What is assumed beside the step may warn, not fail."""
    from pipeline.insight.estimate.memory import RESERVE, estimate_step, run_memory

    if config.train.device == "cpu":
        return CheckResult(PASS, "memory", "not checked on a CPU")
    images = config.train.local_micro_batch_size(world_size)
    try:
        step = estimate_step(config, config.model.num_classes or classes or 1000, images)
    except UserError as error:
        return CheckResult(FAIL, "memory", str(error))
    run = run_memory(step, config, world_size)
    total = run.card_mib(images)
    text = (
        f"about {step.total_mib / 1024:.1f} GiB a GPU for a step of {count(images, 'image')} at once (estimated), and "
    )
    text += f"{(total - step.total_mib) / 1024:.1f} beside it (most of it assumed, not measured)"
    if card_mib is None:
        return CheckResult(PASS, "memory", f"{text}; give --gpu_memory to compare")
    text += f", the card has {card_mib / 1024:.1f}"
    fitting = run.most_images(0.9 * card_mib / (1 - RESERVE))
    too_large = step.total_mib > card_mib
    alone = "the model alone is too large" if too_large else "the model alone nearly fills it"
    remedy = f"give --train.micro_batch_size {fitting}" if fitting > 0 else alone
    if too_large:
        return CheckResult(FAIL, "memory", f"{text}; {remedy}")
    if total > 0.9 * card_mib:
        return CheckResult(WARN, "memory", f"{text}: tight; {remedy}")
    return CheckResult(PASS, "memory", text)
