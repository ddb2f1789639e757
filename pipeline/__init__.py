"""A distributed ImageNet training pipeline whose runs are a pure function of (recipe, index, seed, step).

The names below are loaded at their first use: `import pipeline` imports no torch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import evaluate, load_config, read_ledger, train
    from pipeline.loader.eval_loader import EvalLoader
    from pipeline.loader.train_loader import TrainLoader

__version__ = "0.1.0"

if sys.version_info < (3, 11):  # noqa: UP036 # a batch job may have found another Python than pip; in one line for -m
    found = ".".join(map(str, sys.version_info[:3]))
    raise ImportError("needs Python 3.11 or newer, and " + sys.executable + " is " + found, name="pipeline")

_HOMES = {
    "evaluate": "pipeline.api",
    "load_config": "pipeline.api",
    "read_ledger": "pipeline.api",
    "train": "pipeline.api",
    "EvalLoader": "pipeline.loader.eval_loader",
    "TrainLoader": "pipeline.loader.train_loader",
}

__all__ = ["EvalLoader", "TrainLoader", "evaluate", "load_config", "read_ledger", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
