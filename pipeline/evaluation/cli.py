"""The verb `evaluate`. Signal handlers are installed before torch is imported: a stop request may come at any time."""

from typing import Literal

from pipeline.command import importing
from pipeline.config.train import Precision
from pipeline.errors import UserError
from pipeline.training.ranks.stop_request import StopRequest, die_with_torchrun, join_srun_tasks


def evaluate(argv: list[str]) -> int:
    """`pipeline evaluate RUN`: score a checkpoint; alone or under torchrun."""
    die_with_torchrun()
    join_srun_tasks()
    stop = StopRequest()
    try:
        return _evaluate(argv, stop)
    finally:
        stop.restore_handlers()


def _evaluate(argv: list[str], stop: StopRequest) -> int:
    from pipeline.command import run_command

    with importing():
        from pipeline.evaluation.run import Request, evaluate_run

    def evaluate(
        run: str,
        checkpoint: str = "best",
        weights: str = "both",
        model: str = "resnet152",
        data_root: str | None = None,
        index: str | None = None,
        sizes: str | None = None,
        ten_crop: bool = False,
        flip: bool | None = None,
        recalibrate: int | None = None,
        per_class: str | None = None,
        batch_size: int | None = None,
        precision: Precision | None = None,
        device: Literal["auto", "cuda", "cpu"] = "auto",
        json: str | None = None,
    ) -> int:
        """Score a run's checkpoint, or torchvision's published weights (`evaluate --weights torchvision:IMAGENET1K_V2
        --model resnet152 --data_root DIR`, without RUN), on a whole validation set.

        Args:
            run: the run folder; left out with --weights torchvision:NAME.
            checkpoint: best (highest top-1 so far), last, a step, or a checkpoint folder.
            weights: raw (as they were trained), ema (their average), both where there are both, or torchvision:NAME.
            model: whose published weights to score.
            data_root: other validation images; default: where the run had them. A data root, or any folder with one
                folder a class: of the same names, or named 0, 1, ... (ImageNet-V2).
            index: folder of the data root's index, where the root can't be written; default: the run's, or
                DATA_ROOT/index.
            sizes: pixels to score at, e.g. 224,288 or 224/232,288/288 (crop/resize); default: as in the run.
            ten_crop: the mean over middle, corners, and all mirrored.
            flip: the mean with the mirrored image; default: as in the run.
            recalibrate: training batches to compute BatchNorm's statistics over; default: as in the run.
            per_class: write top-1 and top-5 of each class into this CSV file.
            batch_size: images a rank at once; default: as in the run.
            precision: of the network's arithmetic; default: as in the run.
            device: where to compute.
            json: also write the scores into this file.
        """
        return evaluate_run(Request(**arguments(locals())), stop)

    def arguments(values: dict) -> dict:
        return {key: value for key, value in values.items() if key in Request.__dataclass_fields__}

    if any(item.removeprefix("--weights=").startswith("torchvision:") for item in argv):
        if argv and not argv[0].startswith("-"):
            raise UserError(f"published weights are of no run: leave out {argv[0]}, and give --model NAME")
        argv = [".", *argv]  # RUN, which nobody looks at
    return run_command(evaluate, "evaluate", argv)
