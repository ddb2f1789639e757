"""The verbs `train` and `evaluate`. Signals are caught before torch is imported: a request may come at any time."""

import os
import sys
from pathlib import Path
from typing import Literal

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
    from pipeline.training.lock import RunLock
    from pipeline.training.loop import Trainer
    from pipeline.training.run import make_run_folder

    world = start_world(config.train)
    lock = RunLock(Path(config.run_dir).expanduser().resolve())
    try:
        world.on_main(lambda: (make_run_folder(config), lock.acquire())[1])
        return Trainer(config, world, stop).run()
    except (UserError, BrokenError) as error:
        if lock.held:
            leave_word(config.run_dir, error)
        raise
    finally:
        lock.release()
        world.close()


def evaluate(argv: list[str]) -> int:
    """`pipeline evaluate RUN`: score a checkpoint; alone or under torchrun."""
    die_with_torchrun()
    stop = StopRequest()
    from pipeline.command import run_command
    from pipeline.training.evaluate_run import evaluate_run

    def evaluate(
        run: str,
        checkpoint: str = "best",
        data_root: str | None = None,
        batch_size: int | None = None,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        json: str | None = None,
    ) -> int:
        """Score a run's checkpoint on the whole validation set.

        Args:
            run: the run folder.
            checkpoint: best (highest top-1 so far), last, or a checkpoint folder.
            data_root: where the data lies now; default: where the run had it.
            batch_size: images a rank at once; default: as in the run.
            device: where to compute.
            json: also write the scores into this file.
        """
        return evaluate_run(Path(run), checkpoint, data_root, batch_size, device, json, stop)

    return run_command(evaluate, "evaluate", argv)


def leave_word(run_dir: str, error: UserError | BrokenError) -> None:
    """Mark the run folder as failed, if there is one, for those who look at it from outside."""
    from pipeline.errors import EXIT_BROKEN, EXIT_USER
    from pipeline.training.run import RunFolder

    folder = Path(run_dir).expanduser()
    code = EXIT_USER if isinstance(error, UserError) else EXIT_BROKEN
    if _on_main() and run_dir and (folder / "config.yaml").exists():
        try:
            RunFolder(folder).mark("failed", exit_code=code, message=str(error))
        except OSError as problem:
            print(f"could not mark {folder} as failed: {problem}", file=sys.stderr)
