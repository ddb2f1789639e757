"""The command line of `pipeline launch`: torchrun's own options, and what is not in them."""

import argparse
import contextlib
import io
import itertools
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pipeline.command import split_list
from pipeline.errors import EXIT_USER, UserError, complain
from pipeline.launch.node import Limits

VERBS = ("train", "continue", "evaluate")  # of this package, that run as ranks
_DEFAULT_PORT = 29400
_LONGEST_INTERVAL_S = 3600
_SHUTDOWN_TIMEOUT_S = 120
_UNSUPPORTED = ("run_path", "virtual_local_rank", "event_log_handler", "start_method", "logs_specs")
_WITHOUT_EFFECT = ("local_addr", "signals_to_handle")


@dataclass(frozen=True)
class Options:
    """What a launcher is asked to do.

    Attributes:
        limits: of the job; those of the launcher that hosts the rendezvous count.
        host, port: of the rendezvous. Port 0: any that is free.
        is_host: does this launcher host it? None: if `host` is this machine, and nobody does yet.
        nproc: ranks of this node.
        serve_store: host the rendezvous and start no ranks.
        torch: the options that torch reads itself.
        command: module or file, and its arguments.
    """

    limits: Limits
    host: str
    port: int
    is_host: bool | None
    job: str
    nproc: int
    node_rank: int | None
    monitor_interval_s: float
    shutdown_timeout_s: float
    serve_store: bool
    warm: bool
    torch: argparse.Namespace
    module: str | None = None
    command: list[str] = field(default_factory=list)
    run_dir: str | None = None

    @property
    def about(self) -> dict[str, str]:
        """What the launchers of a job have in common, and those of another one that meets at the same place have not:
        --rdzv-id, and the last part of the run folder, where that is known (nodes may see it under other paths)."""
        return {"--rdzv-id": self.job} | ({"--run_dir": self.run_dir} if self.run_dir else {})


def _parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "pipeline launch"
    parser.usage = (
        "pipeline launch [options] train|continue|evaluate ...   or   [options] -m MODULE ...   or   FILE ..."
    )
    parser.description = (
        "Start the ranks of this node, as torchrun does, with the same options. It knows what their exit codes mean, "
        "and training resumes when nodes join or are lost (--nnodes MIN:MAX). docs/clusters.md has examples."
    )
    parser.add_argument(
        "--rejoin-timeout",
        "--rejoin_timeout",
        type=float,
        default=600.0,
        help="Seconds to wait for lost nodes where fewer than MIN are left; then exit code 69. [600]",
    )
    parser.add_argument(
        "--serve-store",
        "--serve_store",
        action="store_true",
        help="Host the rendezvous at --rdzv-endpoint in this process, and start no ranks: then no node's loss is the "
        "loss of the rendezvous. Its exit code is the job's.",
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="Start each worker as a new interpreter, rather than fork it from a process with all imports done.",
    )

    _add_newer_options(parser)
    own_help = dict.fromkeys((*_UNSUPPORTED, *_WITHOUT_EFFECT), argparse.SUPPRESS) | {
        "max_restarts": "Times in the whole job that ranks which failed are started again. [0]",
        "shutdown_timeout": "Seconds that the ranks have to end after a signal, before they are killed. Environment: "
        f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT. [{_SHUTDOWN_TIMEOUT_S}]",
        "training_script": "train, continue, evaluate, or a program.",
        "training_script_args": "Its arguments.",
    }
    for action in parser._actions:
        action.help = own_help.get(action.dest, action.help)

    def error(message: str) -> NoReturn:
        complain(parser.prog, f"{message} (see pipeline launch --help)")
        sys.exit(EXIT_USER)

    parser.error = error  # type: ignore[method-assign]
    return parser


def _add_newer_options(parser: argparse.ArgumentParser) -> None:
    """Options of newer torchruns, which torch 2.11 lacks."""
    from torch.distributed.argparse_util import env

    known = {action.dest for action in parser._actions}
    if "shutdown_timeout" not in known:
        parser.add_argument(
            "--shutdown-timeout",
            "--shutdown_timeout",
            action=env,
            type=int,
            default=None,
        )
    if "log_line_prefix_template" not in known:
        parser.add_argument(
            "--log-line-prefix-template",
            "--log_line_prefix_template",
            action=env,
            type=str,
            default=None,
            help="Beginning of each line of a rank's output: ${role_name}, ${local_rank} and ${rank} are replaced. "
            "Environment: TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE.",
        )
    parser.set_defaults(master_port=None)  # 29500 in torch 2.11: a second job on the machine would find it taken


def _seconds(name: str, value: object) -> float:
    """A time of 0 or more. Raises UserError that names it otherwise."""
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not number >= 0:  # nor NaN; infinite: for ever
        raise UserError(f"{name} {value}: give seconds, 0 or more")
    return number


def parse(argv: list[str]) -> Options:
    """Raises UserError for what can't be. Exits with code 2 and one line for what is not an option."""
    if "--serve-store" in argv or "--serve_store" in argv:
        argv = [*argv, "train"] if not _names_program(argv) else argv
    given = _parser().parse_args(argv)
    for name in _UNSUPPORTED:
        if getattr(given, name) not in (None, False, "null", "spawn"):
            raise UserError(f"--{name.replace('_', '-')} is not supported by pipeline launch; use torchrun for it")
    conf = _conf(given.rdzv_conf)
    minimum, maximum = _nodes(given.nnodes)
    host, port = _endpoint(given, maximum)
    module, command = _program(given)
    if given.max_restarts < 0:
        raise UserError(f"--max-restarts {given.max_restarts}: give 0 or more")
    if not 0 < given.monitor_interval <= _LONGEST_INTERVAL_S:
        raise UserError(
            f"--monitor-interval {given.monitor_interval:g}: give seconds above 0, at most {_LONGEST_INTERVAL_S}"
        )
    shutdown: tuple[str, object] = "--shutdown-timeout", given.shutdown_timeout
    if given.shutdown_timeout is None:
        name = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
        shutdown = name, os.environ.get(name, _SHUTDOWN_TIMEOUT_S)
    batch_size, run_dir = _training(command) if module == "pipeline" else (None, None)
    limits = Limits(
        minimum,
        maximum,
        max_restarts=given.max_restarts,
        join_timeout_s=_seconds("--rdzv-conf join_timeout", conf.get("join_timeout", conf.get("timeout", 600))),
        last_call_s=_seconds("--rdzv-conf last_call_timeout", conf.get("last_call_timeout", 30)),
        rejoin_timeout_s=_seconds("--rejoin-timeout", given.rejoin_timeout),
        batch_size=batch_size,
    )
    is_host = conf.get("is_host")
    return Options(
        limits=limits,
        host=host,
        port=port,
        is_host=None if is_host is None else is_host.lower() in ("1", "true", "yes"),
        job=given.rdzv_id,
        nproc=0 if given.serve_store else _nproc(given.nproc_per_node),
        node_rank=given.node_rank if given.rdzv_backend == "static" and maximum > 1 else None,
        monitor_interval_s=given.monitor_interval,
        shutdown_timeout_s=_seconds(*shutdown),
        serve_store=given.serve_store,
        warm=not given.cold and module == "pipeline",
        torch=given,
        module=module,
        command=command,
        run_dir=run_dir,
    )


def _names_program(argv: list[str]) -> bool:
    return any(item in VERBS or item in ("-m", "--module") for item in argv)


def _conf(text: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in split_list(text) if item]
    for name, equals, _ in pairs:
        if not equals:
            raise UserError(f"--rdzv-conf {text}: {name} has no value; give NAME=VALUE,NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _nodes(text: str) -> tuple[int, int]:
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not 0 < numbers[0] <= numbers[-1]:
        raise UserError(f"--nnodes {text}: give a number of nodes, or MIN:MAX")
    return numbers[0], numbers[-1]


def _endpoint(given: argparse.Namespace, max_nodes: int) -> tuple[str, int]:
    if given.rdzv_backend not in ("static", "c10d"):
        raise UserError(
            f"--rdzv-backend {given.rdzv_backend}: pipeline launch has static and c10d; use torchrun for it"
        )
    if given.standalone or (not given.rdzv_endpoint and max_nodes == 1 and given.master_port is None):
        return "127.0.0.1", 0
    endpoint = given.rdzv_endpoint or f"{given.master_addr}:{given.master_port or 29500}"
    host, _, port = endpoint.rpartition(":") if endpoint.count(":") == 1 or "]" in endpoint else (endpoint, "", "")
    host = host.strip("[]") or endpoint
    try:
        number = int(port) if port else _DEFAULT_PORT
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 16:
        raise UserError(f"--rdzv-endpoint {endpoint}: give HOST:PORT, the same on every node")
    return ("127.0.0.1" if host == "localhost" else host), number


def _program(given: argparse.Namespace) -> tuple[str | None, list[str]]:
    """(module or None, command): `train ...` alone is this package's verb."""
    script, rest = given.training_script, list(given.training_script_args)
    if given.module:
        return script, rest
    if script in VERBS and not given.no_python and not Path(script).is_file():
        return "pipeline", [script, *rest]
    return None, [script, *rest]


def _nproc(text: str) -> int:
    from torch.distributed.run import determine_local_world_size

    try:
        number = determine_local_world_size(text)
    except ValueError as error:
        raise UserError(f"--nproc-per-node {text}: {error}; give a number") from error
    if number < 1:
        raise UserError(f"--nproc-per-node {text}: give at least 1")
    return number


def _training(command: list[str]) -> tuple[int | None, str | None]:
    """The global batch size and the run folder of a training; None where there is none, or the workers will say what is
    wrong."""
    verb, *argv = command or [""]
    if verb == "continue":  # a continued run keeps the batch
        runs = (word for word in argv if (Path(word) / "config.yaml").is_file())
        argv = [f"--config={run}/config.yaml" for run in itertools.islice(runs, 1)]
    if verb not in ("train", "continue") or not argv:
        return None, None
    from pipeline.config import parse_config

    quiet: Any = io.StringIO()
    with (
        contextlib.redirect_stderr(quiet),
        contextlib.redirect_stdout(quiet),
        contextlib.suppress(SystemExit, ValueError),
    ):
        config = parse_config(argv)
        return config.train.global_batch_size, Path(config.run_dir).name or None
    return None, None
