"""From the command line of `pipeline launch` to what torch's process starter takes: program, output, NUMA binding."""

import os
import shutil
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.numa.binding import AffinityMode, NumaOptions

from pipeline.command import parse_numbers
from pipeline.launch.coordinator import say
from pipeline.launch.options import VERBS, Options
from pipeline.launch.workers import Program


def program_of(options: Options) -> Program:
    """What each rank runs."""
    given, python = options.torch, os.environ.get("PYTHON_EXEC", "")
    if options.module is not None:
        command = [python or sys.executable, "-u", "-m", options.module, *options.command]
    elif given.no_python:
        command = options.command
    else:
        command = [python or sys.executable, "-u", *options.command]
    warm = options.module if options.warm else None
    ours = options.module == "pipeline" and options.command[:1] and options.command[0] in VERBS
    return Program(command[0], tuple(command[1:]), warm, tuple(options.command), bool(ours))


def logs_of(options: Options) -> DefaultLogsSpecs:
    """Where the ranks' output goes. Raises UserError for a filter that is no list of numbers."""
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
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    if not (shutil.which("nvidia-smi") and Path("/proc/driver/nvidia/gpus").is_dir() and len(nodes) > 1):
        say(f"--numa-binding {options.torch.numa_binding}: no NVIDIA GPUs or one NUMA node here; nothing is bound")
        return None
    return NumaOptions(affinity_mode=AffinityMode(options.torch.numa_binding))
