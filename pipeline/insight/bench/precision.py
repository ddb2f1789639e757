"""`bench step --batches`: speed and memory of this project's step on a GPU by precision and batch, with a roofline."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pipeline.command import parse_numbers
from pipeline.errors import TransientError
from pipeline.insight.bench.interleaved import format_rows

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
_WARM_UP, _STEPS = 8, 20


@contextlib.contextmanager
def products_as_convolutions() -> Iterator[None]:
    """While this lasts, fp32 matrix products use TF32 if convolutions do."""
    import torch

    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        products.allow_tf32 = before


def measured_ceilings(device: "torch.device") -> dict[str, float]:
    """What this GPU reaches: dense TFLOP/s of a large matrix product in fp32 and bf16, and GB/s of a copy (bytes read
    and written). fp32 is TF32 where torch runs convolutions in TF32: they are most of a network's work."""
    import torch

    def seconds(action: Callable[[], Any], repeats: int = 20) -> float:
        for _ in range(3):
            action()
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            action()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - begun) / repeats

    n = 8192
    found = {}
    with products_as_convolutions():
        for name, kind in (("tflops", torch.float32), ("half_tflops", torch.bfloat16)):
            a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
            found[name] = 2 * n**3 / seconds(functools.partial(torch.matmul, a, b)) / 1e12
    data = torch.empty(2**30, dtype=torch.uint8, device=device)
    there = torch.empty_like(data)
    found["gb_s"] = 2 * data.nbytes / seconds(lambda: there.copy_(data)) / 1e9
    return found


def one_step_s(model: str, size: int, batch: int, precision: Precision, compile: bool) -> tuple[float, float]:
    """(seconds of a step, MiB that torch's allocator reserves at most), images resident. Raises OutOfMemoryError."""
    import torch

    from pipeline.config import DataConfig, ModelConfig, RawConfig, TrainConfig
    from pipeline.loader.stream import Batch
    from pipeline.model.build import build_model
    from pipeline.training.ranks.world import World
    from pipeline.training.step import TrainStep

    device = torch.device("cuda", torch.cuda.current_device())
    train = TrainConfig(global_batch_size=batch, precision=precision, compile=compile, cuda_graphs=compile)
    config = RawConfig(
        data=DataConfig(image_size=size), model=ModelConfig(name=model, num_classes=1000), train=train
    ).resolve()
    torch.backends.cudnn.benchmark = True
    step = TrainStep(build_model(config.model, 1000), config, World(0, 1, 0, 1, device))
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    targets = torch.randint(0, 1000, (batch,), device=device)
    resident = Batch(images, targets, torch.arange(batch, device=device))
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(_WARM_UP):
        step(resident, 0.01)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(_STEPS):
        step(resident, 0.01)
    torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - begun) / _STEPS
    return seconds, torch.cuda.max_memory_reserved(device) / 2**20


def precision_table(model: str, size: int, batches: str, compile: bool) -> dict:
    """Images/s, memory and the share of the roofline by precision and batch. Raises TransientError without a GPU."""
    import torch

    sizes = parse_numbers("--batches", batches, "64,128,256")
    if not torch.cuda.is_available():
        raise TransientError("bench step --batches requires a GPU; without it, leave the option out")
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measured_ceilings(device)
    print(f"{torch.cuda.get_device_name(device)}: measured " + ", ".join(f"{k} {v:,.0f}" for k, v in ceilings.items()))
    table, lines = [], {}
    for precision in PRECISIONS:
        for batch in sizes:
            row = _measure(model, size, batch, precision, compile, ceilings)
            table.append(row)
            lines[f"{precision} {batch}"] = _line(row)
            print(f"  {precision} {batch:>5}  {_line(row)}", flush=True)
    print(format_rows({"": f"{'images/s':>9}  {'MiB':>8}  of roofline", **lines}))
    return {"model": model, "size": size, "compile": compile, "ceilings": ceilings, "table": table}


def _measure(
    model: str, size: int, batch: int, precision: Precision, compile: bool, ceilings: dict[str, float]
) -> dict:
    import torch

    row: dict[str, Any] = {"precision": precision, "batch": batch}
    try:
        seconds, mib = one_step_s(model, size, batch, precision, compile)
    except torch.OutOfMemoryError:
        return row | {"unavailable": "out of memory"}
    finally:
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    roofline = roofline_s(model, size, batch, precision, ceilings)
    return row | {
        "images_per_s": round(batch / seconds, 1),
        "memory_mib": round(mib),
        "roofline_images_per_s": round(batch / roofline, 1),
        "of_the_roofline": round(roofline / seconds, 3),
    }


def roofline_s(model: str, size: int, batch: int, precision: Precision, ceilings: dict[str, float]) -> float:
    """The least time of a step at these ceilings: each kernel by itself, its FLOPs or its bytes, the slower of both."""
    from pipeline.config import DataConfig, ModelConfig, RawConfig, TrainConfig
    from pipeline.insight.estimate.trace import Tracer

    config = RawConfig(data=DataConfig(image_size=size), model=ModelConfig(name=model), train=TrainConfig()).resolve()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    step = Tracer(config, 1000).trace(batch)
    return step.seconds(ceilings["half_tflops"], ceilings["tflops"], ceilings["gb_s"])


def _line(row: dict) -> str:
    if "unavailable" in row:
        return row["unavailable"]
    return f"{row['images_per_s']:9,.1f}  {row['memory_mib']:8,}  {100 * row['of_the_roofline']:5.1f} %"
