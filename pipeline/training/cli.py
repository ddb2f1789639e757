"""The verb `train`. Signal handlers are installed before torch is imported: a stop request may come at any time."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import TransientError, UserError
from pipeline.imports import importing
from pipeline.rank_env import own_rank
from pipeline.redact import redact
from pipeline.run_paths import RunPaths
from pipeline.training.ranks.stop_request import StopRequest, die_with_torchrun, join_srun_tasks

if TYPE_CHECKING:
    from pipeline.config import Config


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


def _train(argv: list[str], stop: StopRequest) -> int:
    from pipeline.config import parse_config

    return train_config(parse_config(argv), stop)


def train_config(config: "Config", stop: StopRequest) -> int:
    """One rank of a run. Returns the exit code."""
    paths = RunPaths(Path(config.run_dir).expanduser().resolve())
    from pipeline.training.ranks.flight_record import record_flights

    record_flights(paths.debug)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with importing():
        from pipeline.training import loop
        from pipeline.training.ranks.consistency import program_and_settings, refuse_differences
        from pipeline.training.ranks.translate_error import translating_errors
        from pipeline.training.ranks.world import start_watchdog, start_world
        from pipeline.training.run_folder.folder import RunFolder, make_run_folder
        from pipeline.training.run_folder.lock import RunLock
        from pipeline.training.setup import prepare_run

    world = start_world(config.train, stop)
    lock = RunLock(paths.path)

    def before_exit(message: str) -> None:
        if lock.held:
            mark_failed(config.run_dir, TransientError(message))
            lock.release()

    def take_run_folder() -> None:
        make_run_folder(config)
        lock.acquire()

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
    except KeyboardInterrupt:  # asked to stop where there was nothing to save
        if lock.held and paths.path.is_dir():
            RunFolder(paths.path).mark("interrupted", step=0, reason=stop.reason or "interrupted")
        raise
    finally:
        lock.release()
        world.close(failed)


def mark_failed(run_dir: str, error: UserError | TransientError) -> None:
    """Write the marker `failed` to the run folder, if there is one, for those who look at it from outside. A run that
    had finished stays finished, and one that was interrupted stays so where this start was refused."""
    from pipeline.errors import EXIT_RETRY, EXIT_USER
    from pipeline.training.run_folder.folder import RunFolder

    folder = Path(run_dir).expanduser()
    ended = [RunPaths(folder).finished]  # the ledger decides: a start that was refused changes nothing
    if isinstance(error, UserError):
        ended.append(RunPaths(folder).interrupted)
    if any(marker.exists() for marker in ended):
        return
    code = EXIT_USER if isinstance(error, UserError) else EXIT_RETRY
    if _is_rank_zero() and run_dir and RunFolder(folder).config.exists():
        try:
            RunFolder(folder).mark("failed", exit_code=code, message=redact(str(error)))
        except OSError as problem:
            print(f"could not mark {folder} as failed: {problem}", file=sys.stderr)
