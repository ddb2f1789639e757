"""The verb `train`. Signal handlers are installed before torch is imported: a stop request may come at any time."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.command import importing
from pipeline.errors import GpuFault, TransientError, UserError, complain
from pipeline.logs import logger
from pipeline.rank_env import own_rank
from pipeline.redact import redact
from pipeline.run_paths import RunPaths
from pipeline.training.ranks.stop_request import StopRequest, die_with_torchrun, join_srun_tasks

if TYPE_CHECKING:
    from pipeline.config import Config


@dataclass(frozen=True)
class ContinueOptions:
    """Options of `pipeline continue`."""

    epochs: float | str | None = None
    """Length of both runs together: epochs (120 or "120ep") or batches ("5000ba")."""
    rate: Literal["follow", "restart", "last"] | None = None
    """The learning rate from here on. follow: the same curve goes on (step, multistep, constant); restart: the curve
    again over what is added, with a warm-up; last: as it was in the last step. Default: follow, otherwise restart."""
    run_dir: str | None = None
    """The new run's folder; default: RUN-to-N."""


def _is_rank_zero() -> bool:
    return own_rank() == 0


def train(argv: list[str]) -> int:
    """`pipeline train`: one rank of a run; see `pipeline.training.loop`."""
    die_with_torchrun()
    join_srun_tasks()
    stop = StopRequest()
    try:
        return _train(argv, stop)
    finally:
        stop.restore_handlers()


def continue_run(argv: list[str]) -> int:
    """`pipeline continue RUN --epochs N`: one rank of a run that trains a finished one on, in a folder of its own."""
    die_with_torchrun()
    join_srun_tasks()
    stop = StopRequest()
    try:
        return _continue(argv, stop)
    finally:
        stop.restore_handlers()


def _continue(argv: list[str], stop: StopRequest) -> int:
    from pipeline.command import make_parser, normalize, split_options

    parser = make_parser(
        "pipeline continue",
        "Train a finished run on, in a new run folder: its weights, momentum, average and order of images go on. "
        "Run the same command again to resume. Further options are those of pipeline train.",
        "RUN --epochs N [options]",
    )
    parser.add_argument("run", help="folder of a finished run")
    parser.add_class_arguments(ContinueOptions, as_group=False)
    argv = normalize(argv, set())
    if not argv or {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"] if argv else argv)
    options, rest = split_options(ContinueOptions, "continue", argv)
    runs, overrides = [item for item in rest if not item.startswith("-")][:1], list(rest)
    if not runs or rest[0] != runs[0]:
        raise UserError("give the folder of a finished run first: pipeline continue RUN --epochs N")
    if options.epochs is None:
        raise UserError(
            f"--epochs is required, the length of both runs together: pipeline continue {runs[0]} --epochs 120"
        )
    with importing():
        from pipeline.training.run_folder.extend import begin_extension, plan_extension

    plan = plan_extension(runs[0], options.epochs, options.rate, options.run_dir, overrides[1:])

    def begin() -> None:
        begin_extension(plan)
        logger.info("%s", plan.about)

    return train_config(plan.config, stop, begin)


def _train(argv: list[str], stop: StopRequest) -> int:
    from pipeline.config import parse_config

    config = parse_config(argv)
    if not any(item.partition("=")[0] == "--config" for item in argv):
        complain("pipeline train", _defaults_line(config))
    return train_config(config, stop)


def _defaults_line(config: "Config") -> str:
    """What is trained where no recipe is given."""
    schedule, optim = config.schedule, config.optim
    return (
        f"no --config, so all options that are not given have their defaults: {config.model.name}, "
        f"schedule.epochs {schedule.epochs}, train.global_batch_size {config.train.global_batch_size}, {optim.name} "
        f"with optim.lr {optim.lr}; --config NAME takes a recipe (pipeline recipes lists them)"
    )


def train_config(config: "Config", stop: StopRequest, begin: Callable[[], None] = lambda: None) -> int:
    """One rank of a run. begin: called by rank 0 when the run folder is its own. Returns the exit code."""
    paths = RunPaths(Path(config.run_dir).expanduser().resolve())
    from pipeline.training.ranks.flight_record import flight_settings
    from pipeline.training.run_folder.gpu_fault import refuse_restart_in_place

    if config.run_dir:
        refuse_restart_in_place(paths.path)
    settings = {"TORCH_CPP_LOG_LEVEL": "ERROR", **flight_settings(paths.debug)}
    if config.train.compile:
        settings |= compile_cache_settings(Path(config.train.compile_cache or paths.compile_cache))
    with environment_defaults(settings):
        return _train_config(config, paths, stop, begin)


def _train_config(config: "Config", paths: RunPaths, stop: StopRequest, begin: Callable[[], None]) -> int:
    with importing():
        from pipeline.training import loop
        from pipeline.training.ranks.consistency import program_and_settings, refuse_differences
        from pipeline.training.ranks.translate_error import first_line, translating_errors
        from pipeline.training.ranks.world import start_watchdog, start_world
        from pipeline.training.run_folder.folder import RunFolder, make_run_folder
        from pipeline.training.run_folder.gpu_fault import record_gpu_fault
        from pipeline.training.run_folder.lock import RunLock
        from pipeline.training.setup import prepare_run

    try:
        world = start_world(config.train, stop)
    except GpuFault as error:
        record_gpu_fault(paths.path, own_rank(), None, redact(str(error)))
        raise
    lock = RunLock(paths.path)

    def before_exit(message: str) -> None:
        if lock.held:
            mark_failed(config.run_dir, TransientError(message))
            lock.release()

    def take_run_folder() -> None:
        make_run_folder(config)
        lock.acquire()
        begin()

    world.watch.folder, world.watch.before_exit = paths.debug if config.run_dir else None, before_exit
    failed = True
    try:
        start_watchdog(world)
        with translating_errors(config, world):
            refuse_differences(program_and_settings(config, world), world)
            world.on_rank_zero(take_run_folder)
            code = loop.train(prepare_run(config, world, stop, lock.confirm))
            world.wait_for_rank_zero()
        failed = False
        return code
    except (UserError, TransientError) as error:
        if lock.held:
            mark_failed(config.run_dir, error)
        if error.on_all_ranks:
            world.wait_for_all()  # the first rank that is gone makes torchrun and Slurm end the others
        raise
    except Exception as error:  # one that nobody foresaw
        if lock.held:
            mark_failed(config.run_dir, TransientError(f"{type(error).__name__}: {first_line(error)}"))
        raise
    except KeyboardInterrupt:  # asked to stop where there was nothing to save
        with contextlib.suppress(OSError):  # its server may be away
            ended = paths.finished.exists() or paths.interrupted.exists()
            if lock.held and paths.path.is_dir() and not ended:
                RunFolder(paths.path).mark("interrupted", step=0, reason=stop.reason or "interrupted")
        raise
    finally:
        lock.release()
        world.close(failed)


def compile_cache_settings(folder: Path) -> dict[str, str]:
    """Environment variables by which torch.compile keeps its caches in `folder`. Otherwise they lie in TMPDIR, which a
    job's end removes."""
    folder = folder.expanduser().absolute()
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def _set_by_torch(name: str) -> bool:
    """Has torch, and not the user, set this variable, to its own folder or one below it? It does so when a process
    compiles for the first time."""
    module = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    if module is None:
        return False
    return Path(os.environ.get(name, "")).is_relative_to(Path(module.default_cache_dir()).absolute())


@contextlib.contextmanager
def environment_defaults(settings: Mapping[str, str]) -> Iterator[None]:
    """Environment variables of one run: those that the user has not set are set, and put back at its end. Another run
    of this process has its own."""
    own = {name: value for name, value in settings.items() if name not in os.environ or _set_by_torch(name)}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def mark_failed(run_dir: str, error: UserError | TransientError) -> None:
    """Write the marker `failed` to the run folder, if there is one, for those who look at it from outside. A run that
    had finished stays finished, and one that was interrupted stays so where this start was refused."""
    from pipeline.errors import EXIT_RETRY, EXIT_USER
    from pipeline.training.run_folder.folder import RunFolder

    folder = RunFolder(Path(run_dir).expanduser())
    ended = [folder.finished]  # the ledger decides: a start that was refused changes nothing
    if isinstance(error, UserError):
        ended.append(folder.interrupted)
    code = EXIT_USER if isinstance(error, UserError) else EXIT_RETRY
    try:
        if run_dir and _is_rank_zero() and folder.config.exists() and not any(marker.exists() for marker in ended):
            folder.mark("failed", exit_code=code, message=redact(str(error)))
    except OSError as problem:  # its server may be away: that is the error, perhaps
        logger.warning("could not mark %s as failed: %s", folder.path, problem)
