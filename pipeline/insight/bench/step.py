"""`bench step`: the training loop against a bare PyTorch loop; on a GPU also a table of precisions and a roofline."""

from typing import Literal

from pipeline.insight.bench.interleaved import Candidate, ratio_line, ratios, run_interleaved, spread_table


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
    """The overhead of the training loop over a bare PyTorch loop with the same model, precision and batch.

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
        batches: on a GPU, instead: speed, memory and share of the roofline at these sizes (64,128), by precision.
    """
    from pipeline.insight.bench import loops

    if batches:
        from pipeline.insight.bench.precision import precision_table

        return precision_table(model, size, batches, compile)
    options = {"device": device, "compile": compile}
    common = {
        "model": model, "size": size, "batch": batch_size, "precision": precision, "steps": steps, "threads": threads
    }  # fmt: skip
    candidates = [
        Candidate(name, make, {**common, "options": options})
        for name, make in (("pipeline", loops.pipeline), ("bare", loops.bare), ("bare again", loops.bare))
    ]
    on_gpu = loops.compute_device(device).type == "cuda"  # whose memory would hold three networks at once
    measured = run_interleaved(candidates, rounds, warm_up=2, title=f"bench step, {model}", alone=on_gpu)
    result: dict = {**common, "compile": compile, "rounds": rounds, "overhead": {}}
    for what, name in (("cpu_ms", "CPU ms a step"), ("wall_ms", "ms a step")):
        print(f"\n{name} (median of rounds, minimum and maximum)")
        print(spread_table(measured, what))
        for other in ("pipeline", "bare again"):  # the second shows how much of a difference is chance
            spread = ratios(measured, "bare", other, what)
            assert spread is not None  # neither is ever unavailable
            print(ratio_line(other, "bare", spread))
            result["overhead"][f"{what}: {other} / bare"] = spread.as_dict()
        low = min(getattr(measured["pipeline"], what)) / min(getattr(measured["bare"], what))
        print(f"  {low:6.3f} x  of the minima: overhead {100 * (low - 1):+.1f} %")
        result["overhead"][f"{what}: minimum / minimum"] = round(low, 4)
    result["measured"] = {name: one.as_dict() for name, one in measured.items()}
    return result
