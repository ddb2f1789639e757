"""From the command line of `pipeline launch` to what torch's process starter takes: program, output, NUMA binding."""

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.numa.binding import AffinityMode, NumaOptions

from pipeline.command import close_to, parse_numbers
from pipeline.errors import UserError
from pipeline.gpu_facts import query_gpus, visible_gpus
from pipeline.launch.coordinator import say
from pipeline.launch.options import VERBS, Options


@dataclass(frozen=True)
class Program:
    """What each worker runs.

    Attributes:
        entrypoint, arguments: the command.
        module, argv: the same for a process forked from a warm one, `python -m module argv`; None: it is never forked.
        asks_for_signals: does it take the signals `stop_request.HELD_BACK`, once it has handlers for them? They wait
            until then: one that came before would kill it, and the ranks of the other nodes would wait for it.
    """

    entrypoint: str
    arguments: tuple[str, ...]
    module: str | None = None
    argv: tuple[str, ...] = ()
    asks_for_signals: bool = False


def program_of(options: Options) -> Program:
    """What each rank runs. Raises UserError for a program that is not there."""
    given, python = options.torch, os.environ.get("PYTHON_EXEC", "")
    if options.module is not None:
        command = [python or sys.executable, "-u", "-m", options.module, *options.command]
    elif given.no_python:
        if shutil.which(options.command[0]) is None:
            raise UserError(
                f"no program {options.command[0]} that can be run; give its path, or one that PATH leads to"
            )
        command = options.command
    else:
        _check_script(options.command[0])
        command = [python or sys.executable, "-u", *options.command]
    warm = options.module if options.warm else None
    ours = options.module == "pipeline" and options.command[:1] and options.command[0] in VERBS
    return Program(command[0], tuple(command[1:]), warm, tuple(options.command), bool(ours))


def _check_script(name: str) -> None:
    if not Path(name).exists():
        close = close_to(name, VERBS)
        hint = f"did you mean {close}?" if close else "give a program"
        raise UserError(f"no file {name}, and no command that runs as ranks ({', '.join(VERBS)}); {hint}")


def logs_of(options: Options) -> DefaultLogsSpecs:
    """Where the ranks' output goes. Raises UserError for a filter that is not a list of numbers."""
    given = options.torch
    redirects, tee = Std.from_str(given.redirects), Std.from_str(given.tee)
    wanted = given.log_dir or redirects != Std.NONE or tee != Std.NONE
    ranks = None
    if given.local_ranks_filter:
        ranks = set(parse_numbers("--local-ranks-filter", given.local_ranks_filter, "0,1,2", smallest=0))
    return DefaultLogsSpecs(
        log_dir=given.log_dir if wanted else os.devnull, redirects=redirects, tee=tee, local_ranks_filter=ranks
    )


def numa_of(options: Options) -> NumaOptions | None:
    """How ranks are bound to the cores beside their GPU; None, after one line that says so, where that can't work."""
    if options.torch.numa_binding is None:
        return None
    problem = binding_problem(options.nproc)
    if problem:
        say(f"--numa-binding {options.torch.numa_binding}: {problem}; nothing is bound")
        return None
    return NumaOptions(affinity_mode=AffinityMode(options.torch.numa_binding))


def binding_problem(ranks: int, machine: Path = Path("/")) -> str | None:
    """Why torch could not bind so many ranks to the cores beside their GPUs, in words. machine: its root folder."""
    nodes = machine / "sys/devices/system/node"
    gpus = visible_gpus(query_gpus()[0], os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not (gpus and (machine / "proc/driver/nvidia/gpus").is_dir() and len(list(nodes.glob("node[0-9]*"))) > 1):
        return "no NVIDIA GPUs or one NUMA node here"
    if shutil.which("numactl") is None:
        return "numactl is not installed here"
    allowed = os.sched_getaffinity(0)
    for gpu in gpus[:ranks]:
        device = machine / "sys/bus/pci/devices" / gpu.bus_id.lower()[-12:]  # nvidia-smi writes a longer domain
        with contextlib.suppress(OSError, ValueError):
            number = max(0, int((device / "numa_node").read_text(encoding="utf-8")))
            beside = parse_cores((nodes / f"node{number}/cpulist").read_text(encoding="utf-8"))
            if not beside & allowed:
                return f"this job has none of the cores beside GPU {gpu.bus_id}, those of NUMA node {number}"
    return None


def parse_cores(text: str) -> set[int]:
    """The numbers in a list as the kernel writes it: 0-3,8."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}
