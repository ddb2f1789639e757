"""The checks of `preflight` of what the nodes are made of: GPUs and their driver, limits."""

from pipeline.config import Config
from pipeline.counts import count
from pipeline.gpu_facts import kernels_problem
from pipeline.insight.preflight.check_result import FAIL, PASS, WARN, CheckResult
from pipeline.limits import files_needed


def check_gpus(nodes: list[dict], config: Config) -> CheckResult:
    """Are there as many GPUs as Slurm granted, with a driver that fits? Or is the run meant for a CPU, which is fast in
    its precision? nodes: at least one."""
    import torch

    from pipeline.training.validate import precision_warning, slow_bf16

    node = nodes[0]
    gpus = len(node["gpus"])
    names = ", ".join(sorted({gpu["name"] for gpu in node["gpus"]}))
    seen = f"{gpus} x {names}" if gpus else "none seen by nvidia-smi"
    slow = precision_warning(config.train.precision, "cpu")
    if config.train.device == "cpu":
        text = f"{seen}; not used: --train.device cpu, {count(node['cpus'], 'core')}"
        return CheckResult(WARN, "GPUs", f"{text}; {slow}") if slow else CheckResult(PASS, "GPUs", text)
    for other in nodes:
        problem = gpu_problem(other)
        if problem:
            return CheckResult(FAIL, "GPUs", f"{other['node']}: {problem}")
    if not gpus and config.train.device == "cuda":
        return CheckResult(WARN, "GPUs", f"{seen} here; the nodes of the job must have some")
    if not gpus:
        text = f"{seen}: would train on {count(node['cpus'], 'core')} of the CPU"
        return CheckResult(WARN, "GPUs", f"{text}; {slow}" if slow else text)
    if any(gpu["mig"] for gpu in node["gpus"]):
        text = "split by MIG: a process uses one instance, and NCCL joins none; start one process"
        return CheckResult(WARN if gpus == 1 else FAIL, "GPUs", f"{seen}, {text}")
    for gpu in (gpu for other in nodes for gpu in other["gpus"] if gpu["capability"]):
        problem = kernels_problem(gpu["capability"], torch.cuda.get_arch_list())
        if problem:
            return CheckResult(FAIL, "GPUs", f"{gpu['name']}: {problem}")
        if gpu["capability"][0] < 8 and config.train.precision == "bf16":
            return CheckResult(WARN, "GPUs", f"{seen}; {slow_bf16(gpu['name'])}")
    return CheckResult(PASS, "GPUs", seen)


def gpu_problem(node: dict) -> str | None:
    """Why the GPUs of a node can't be used, and the remedy; None: they can be, or there are none."""
    gpus, granted = len(node["gpus"]), node["granted_gpus"]
    if node["driver_problem"] and (gpus or granted):
        return f"{node['driver_problem']}; have the driver updated, or install a torch that is built for an older CUDA"
    though = f"Slurm granted {granted}" if gpus < granted else node.get("sign_of_gpus")
    if though:
        fails = f", which fails ({node['smi_problem']})" if node.get("smi_problem") else ""
        seen = f"{count(gpus, 'GPU') if gpus else 'no GPUs'} seen by nvidia-smi{fails}, though {though}"
        return f"{seen}; ask your cluster's support, or give --train.device cpu"
    return None


def check_open_files(nodes: list[dict], world_size: int) -> CheckResult:
    """May a rank open as many files as it needs connections to the others?"""
    needed = files_needed(world_size)
    limit, name = min((node["open_files"] if node["open_files"] >= 0 else 1 << 30, node["node"]) for node in nodes)
    if limit < needed:
        text = f"{world_size} ranks need about {needed:,} in each, {name} allows {limit:,}"
        return CheckResult(FAIL, "open files", f"{text}; have the hard limit raised (ulimit -Hn, limits.conf)")
    return CheckResult(PASS, "open files", f"about {needed:,} per rank; the limit is {limit:,}")
