"""The verbs `train` and `evaluate`. Signals are caught before torch is imported: a request may come at any time."""

import os
import sys

from pipeline.errors import BrokenError, UserError
from pipeline.training.preemption import StopRequest, die_with_torchrun


def _on_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def train(argv: list[str]) -> int:
    """`pipeline train`: one rank of a run; see `pipeline.training.loop`."""
    die_with_torchrun()
    stop = StopRequest()
    from pipeline.config import parse_config

    config = parse_config(argv)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pipeline.training.distributed import start_world
    from pipeline.training.loop import Trainer

    world = start_world(config.train)
    try:
        return Trainer(config, world, stop).run()
    except (UserError, BrokenError) as error:
        leave_word(config.run_dir, error)
        raise
    finally:
        world.close()


def leave_word(run_dir: str, error: UserError | BrokenError) -> None:
    """Mark the run folder as failed, if there is one, for those who look at it from outside."""
    from pathlib import Path

    from pipeline.errors import EXIT_BROKEN, EXIT_USER
    from pipeline.training.run import RunFolder

    folder = Path(run_dir).expanduser()
    code = EXIT_USER if isinstance(error, UserError) else EXIT_BROKEN
    if _on_main() and run_dir and (folder / "config.yaml").exists():
        try:
            RunFolder(folder).mark("failed", exit_code=code, message=str(error))
        except OSError as problem:
            print(f"could not mark {folder} as failed: {problem}", file=sys.stderr)
