"""The verbs `train` and `evaluate`. Signals are caught before torch is imported: a request may come at any time."""

import os
import sys
from pathlib import Path
from typing import Literal

from pipeline.errors import TransientError, UserError
from pipeline.imports import importing
from pipeline.redact import redact
from pipeline.training.ranks.stop_request import StopRequest, die_with_torchrun


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"


def train(argv: list[str]) -> int:
    """`pipeline train`: one rank of a run; see `pipeline.training.loop`."""
    die_with_torchrun()
    stop = StopRequest()
    from pipeline.config import parse_config

    config = parse_config(argv)
    run_dir = Path(config.run_dir).expanduser().resolve()
    from pipeline.training.ranks.watchdog import DEBUG, record_flights

    record_flights(run_dir / DEBUG)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with importing():
        from pipeline.training.loop import Trainer
        from pipeline.training.ranks.consistency import program_and_settings, refuse_differences
        from pipeline.training.ranks.translate_error import translating_errors
        from pipeline.training.ranks.world import meet_all, start_world
        from pipeline.training.run_folder.folder import make_run_folder
        from pipeline.training.run_folder.lock import RunLock

    world = start_world(config.train)
    lock = RunLock(run_dir)

    def last_words(message: str) -> None:
        if lock.held:
            leave_word(config.run_dir, TransientError(message))
            lock.release()

    world.watch.folder, world.watch.last_words = run_dir / DEBUG if config.run_dir else None, last_words
    try:
        meet_all(world)
        with translating_errors(config, world):
            refuse_differences(program_and_settings(config, world), world)
            world.on_rank_zero(lambda: (make_run_folder(config), lock.acquire())[1])
            return Trainer(config, world, stop).run()
    except (UserError, TransientError) as error:
        if lock.held:
            leave_word(config.run_dir, error)
        if error.on_all_ranks:
            world.meet()  # the first rank that is gone makes torchrun and Slurm end the others
        raise
    finally:
        lock.release()
        world.close()


def evaluate(argv: list[str]) -> int:
    """`pipeline evaluate RUN`: score a checkpoint; alone or under torchrun."""
    die_with_torchrun()
    stop = StopRequest()
    from pipeline.command import run_command

    with importing():
        from pipeline.evaluation.run import Request, evaluate_run

    def evaluate(
        run: str,
        checkpoint: str = "best",
        weights: str = "both",
        model: str = "resnet152",
        data_root: str | None = None,
        sizes: str | None = None,
        ten_crop: bool = False,
        flip: bool | None = None,
        recalibrate: int | None = None,
        per_class: str | None = None,
        batch_size: int | None = None,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        json: str | None = None,
    ) -> int:
        """Score a run's checkpoint, or torchvision's published weights (`evaluate --weights torchvision:IMAGENET1K_V2
        --model resnet152 --data_root DIR`, without RUN), on a whole validation set.

        Args:
            run: the run folder.
            checkpoint: best (highest top-1 so far), last, a step, or a checkpoint folder.
            weights: raw (as they were trained), ema (their average), both where there are both, or torchvision:NAME.
            model: whose published weights to score.
            data_root: other validation images; default: where the run had them. A data root, or any folder with one
                folder a class: of the same names, or named 0, 1, ... (ImageNet-V2).
            sizes: pixels to score at, e.g. 224,288 or 224/232,288/288 (crop/resize); default: as in the run.
            ten_crop: the mean over middle, corners, and all mirrored.
            flip: the mean with the mirrored image; default: as in the run.
            recalibrate: training batches to compute BatchNorm's statistics over; default: as in the run.
            per_class: write top-1 and top-5 of each class into this CSV file.
            batch_size: images a rank at once; default: as in the run.
            device: where to compute.
            json: also write the scores into this file.
        """
        return evaluate_run(Request(**arguments(locals())), stop)

    def arguments(values: dict) -> dict:
        return {key: value for key, value in values.items() if key in Request.__dataclass_fields__}

    if any(item.removeprefix("--weights=").startswith("torchvision:") for item in argv):
        if argv and not argv[0].startswith("-"):
            raise UserError(f"published weights are of no run: leave out {argv[0]}, and give --model NAME")
        argv = ["", *argv]
    return run_command(evaluate, "evaluate", argv)


def leave_word(run_dir: str, error: UserError | TransientError) -> None:
    """Mark the run folder as failed, if there is one, for those who look at it from outside."""
    from pipeline.errors import EXIT_RETRY, EXIT_USER
    from pipeline.training.run_folder.folder import RunFolder

    folder = Path(run_dir).expanduser()
    code = EXIT_USER if isinstance(error, UserError) else EXIT_RETRY
    if _is_rank_zero() and run_dir and (folder / "config.yaml").exists():
        try:
            RunFolder(folder).mark("failed", exit_code=code, message=redact(str(error)))
        except OSError as problem:
            print(f"could not mark {folder} as failed: {problem}", file=sys.stderr)
