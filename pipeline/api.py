"""The package from Python: what the commands `train` and `evaluate` do, without a command line.

Run a script with these under `python` or `torchrun`, as `pipeline train` itself.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.command import raising, split_options
from pipeline.config import Config, parse_config
from pipeline.config.names import check_null
from pipeline.errors import EXIT_OK, TransientError, UserError
from pipeline.output import unfailing_output
from pipeline.run_paths import RunPaths
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.ranks.stop_request import StopRequest

_BUSY = threading.Lock()  #: held while a run is trained or evaluated
_used_by: set[int] = set()  #: process that has trained or evaluated: this one, or one that it was forked from

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)


def load_config(recipe: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """A recipe's name or file, or a run's config.yaml, with options as on the command line:
    `load_config("resnet152", {"data.root": "/data/imagenet", "run_dir": "runs/first"})`.

    Raises UserError in one line for what is unknown or impossible.
    """
    for name, value in (options or {}).items():
        group, _, key = name.rpartition(".")
        check_null({group: {key: value}} if group else {name: value})
    arguments = [f"--{name}={_as_typed(name, value)}" for name, value in (options or {}).items()]
    with raising("train"):
        return parse_config(["--config", str(recipe), *arguments])


def train(config: Config) -> bool:
    """Train a run, or resume it: one rank, as `pipeline train`. Returns whether it is finished; False: it was asked to
    stop (SIGTERM, SIGUSR1, Ctrl-C, a stop file) and has saved, and the same call resumes.

    Signal handlers are set while it trains, and put back. Raises UserError for what you can fix, TransientError for
    what broke underneath.
    """
    from pipeline.training.cli import train_config

    if not isinstance(config, Config):
        raise UserError(f"config is {config!r:.80}: give what pipeline.load_config returns for it")
    with _alone(), _stop_request() as stop, unfailing_output(), _own_defaults():
        train_config(config, stop)
    return RunPaths(Path(config.run_dir).expanduser()).finished.exists()


def evaluate(run: str | Path, **options: Any) -> dict[str, Any]:
    """Score a run's checkpoint on the whole validation set: one rank, as `pipeline evaluate`, whose options are named
    as there (checkpoint, weights, data_root, sizes, flip, batch_size, device, ...).

    Returns val_loss, val_top1 and val_top5 (percent), images, ... of the first network and size, and all of them under
    "results"; {} on ranks other than 0. Raises UserError, and TransientError where it was asked to stop.
    """
    from pipeline.evaluation.run import Request, evaluate_run

    unknown = options.keys() - Request.__dataclass_fields__.keys()
    if unknown or "json" in options:
        raise UserError(f"unknown option {min(unknown or {'json'})}; see: pipeline evaluate --help")
    if isinstance(options.get("sizes"), list | tuple):
        options["sizes"] = ",".join(map(str, options["sizes"]))
    given = {"run": str(run)} | {name: value for name, value in options.items() if value is not None}
    with raising("evaluate"):
        asked, _ = split_options(Request, "evaluate", [f"--{name}={_as_typed(name, v)}" for name, v in given.items()])
    with tempfile.TemporaryDirectory(prefix="evaluate-") as folder, _alone(), _stop_request() as stop, _own_defaults():
        file = Path(folder) / "scores.json"
        code = evaluate_run(dataclasses.replace(asked, json=str(file)), stop)
        if stop or code != EXIT_OK:
            raise TransientError("the evaluation was asked to stop")
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def read_ledger(run: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, also while it trains, ready for `pandas.DataFrame`. kind: only "train", "eval"
    or "event". Raises UserError where there is no run, and for another kind."""
    if kind not in (None, "train", "eval", "event"):
        raise UserError(f"kind is {kind!r}: give 'train', 'eval' or 'event', or leave it out")
    paths = RunPaths(Path(run).expanduser())
    if not paths.ledger.exists():
        raise UserError(f"{run} has no metrics.jsonl; give a run folder")
    return [row for row in read_rows(paths.ledger) if kind is None or row.get("kind") == kind]


def _as_typed(name: str, value: Any) -> str:
    """An option's value as it is typed on the command line. NumPy's and torch's numbers and arrays are those of Python.
    Raises UserError for what can't be typed."""
    value = _plain(value)
    try:
        return value if isinstance(value, str) else json.dumps(value, default=_plain)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {value!r:.80}: give a text, a number, a list or a dict") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path) or type(value).__name__ == "device":
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One run at a time: a process has one process group, and torch's threads do not live on in a forked one. Raises
    UserError where another thread trains or evaluates, and in a process that was forked from one that has."""
    if _used_by - {os.getpid()}:
        raise UserError(
            "this process was forked from one that has trained or evaluated, whose threads it lacks: it would wait for "
            'them; start processes with multiprocessing.get_context("spawn")'
        )
    if not _BUSY.acquire(blocking=False):
        raise UserError(
            "another thread of this process trains or evaluates; call one after the other, or give each a process"
        )
    _used_by.add(os.getpid())
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook  # torch wraps it for each process group, and every line of an error would name them all
        _BUSY.release()


@contextlib.contextmanager
def _own_defaults() -> Iterator[None]:
    """torch's own default dtype and device while a run lasts: with those that the program has set, it would differ from
    the command's."""
    torch = sys.modules.get("torch")
    if torch is None:  # nobody has set one
        yield
        return
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)


@contextlib.contextmanager
def _stop_request() -> Iterator[StopRequest]:
    """A stop request that listens to signals (in the main thread, where Python allows it), with the handlers put back
    at the end."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS} if main else {}
    try:
        yield StopRequest(install=main)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
