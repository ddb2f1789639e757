"""`bench step`: the training loop beside a bare PyTorch loop; a table of precisions and batches; a roofline."""

from typing import Literal

from pipeline.insight.bench.arena import Contender, compete, ratios
from pipeline.insight.bench.table import contest_table, ratio_line


def step(
    model: str = "resnet18",
    size: int = 64,
    batch_size: int = 32,
    precision: Literal["bf16", "fp16", "fp32"] = "fp32",
    steps: int = 4,
    rounds: int = 9,
    threads: int | None = None,
    compile: bool = False,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    batches: str | None = None,
) -> dict:
    """What the training loop costs above a bare PyTorch loop with the same model, precision and batch.

    Args:
        model: a torchvision classification model.
        size: pixels of an image's side.
        batch_size: images a step.
        precision: of both loops.
        steps: steps a round.
        rounds: rounds that count, after two that do not.
        threads: of torch; default: the cores.
        compile: torch.compile in both loops.
        device: where to compute.
        batches: instead, on a GPU, images/s, memory and the share of the roofline at these (64,128,256), by precision.
    """
    from pipeline.insight.bench import loops

    if batches:
        from pipeline.insight.bench.precision import precision_table

        return precision_table(model, size, batches, compile)
    options = {"device": device, "compile": compile}
    common = {
        "model": model, "size": size, "batch": batch_size, "precision": precision, "steps": steps, "threads": threads
    }  # fmt: skip
    contenders = [
        Contender(name, make, {**common, "options": options})
        for name, make in (("ours", loops.ours), ("bare", loops.bare), ("bare again", loops.bare))
    ]
    outcomes = compete(contenders, rounds, warm_up=2, about=f"bench step, {model}")
    result: dict = {**common, "compile": compile, "rounds": rounds, "overhead": {}}
    for what, name in (("cpu_ms", "CPU ms a step"), ("wall_ms", "ms a step")):
        print(f"\n{name} (median of rounds, least and greatest)")
        print(contest_table(outcomes, what))
        for other in ("ours", "bare again"):  # the second tells how much of a difference is chance
            spread = ratios(outcomes, "bare", other, what)
            print(ratio_line(other, "bare", spread))
            result["overhead"][f"{what}: {other} / bare"] = spread.plain()
        low = min(getattr(outcomes["ours"], what)) / min(getattr(outcomes["bare"], what))
        print(f"  {low:6.3f} x  of the least of each: overhead {100 * (low - 1):+.1f} %")
        result["overhead"][f"{what}: least / least"] = round(low, 4)
    result["outcomes"] = {name: outcome.plain() for name, outcome in outcomes.items()}
    return result
