"""Imported once a node, by the process that the workers are forked from: all that training imports, and no CUDA.

Only names: this room does not use what it loads.
"""

import atexit
import contextlib
import gc
import importlib
import os
import signal
import sys
from pathlib import Path

from pipeline.command import importing
from pipeline.training.ranks.stop_request import HELD_BACK, OUTLIVED

#: of `pipeline train`, and what it imports later than at its start
MODULES = (
    "pipeline.training.cli",
    "pipeline.training.loop",
    "pipeline.training.ranks.consistency",
    "pipeline.training.ranks.translate_error",
    "pipeline.training.ranks.world",
    "pipeline.training.run_folder.folder",
    "pipeline.training.run_folder.local",
    "pipeline.training.run_folder.lock",
    "pipeline.training.setup",
    "pipeline.evaluation.run",
    "pipeline.loader.decode.dali",
    "nvidia.dali.fn",
    "nvidia.dali.plugin.pytorch",
    "torch.distributed.optim",
    "torch._dynamo",
)

signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # in the workers too, until they have handlers
for number in OUTLIVED:
    if signal.getsignal(number) != signal.SIG_IGN:  # as by nohup
        signal.signal(number, lambda *_: None)

with importing():
    for name in MODULES:
        with contextlib.suppress(ImportError, OSError):  # the worker will say it
            importlib.import_module(name)
atexit.register(os._exit, 0)  # this process does nothing at its end; some of these modules would print
gc.collect()
gc.freeze()  # what is here is shared by all workers; the collector would touch, and so copy, every page
if sys.platform.startswith("linux"):
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        print(f"pipeline launch: imports have started {threads - 1} threads: ranks are not forked", file=sys.stderr)
        os._exit(1)
