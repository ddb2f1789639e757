"""What the hardware reaches, and what a step, a checkpoint and the loader make of it."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.insight.estimate.gpus import find_card
from pipeline.insight.qualify.rows import Row, Settings, judged, skipped

_MATMUL, _COPY, _MEMORY = 0.70, 0.85, 0.10  # shares of the data sheet; error of the estimate
_LOADER, _IDLE = 1.3, 0.03  # times the step's need; share of a step


def ceilings(settings: Settings) -> Iterator[Row]:
    """Matrix products and copies against the data sheet."""
    if settings.device != "cuda":
        yield from _cpu_ceilings()
        return
    from pipeline.insight.bench.precision import measured_ceilings

    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        name, found = torch.cuda.get_device_name(device), measured_ceilings(device)
        try:
            card = find_card(name.removesuffix(" 80GB HBM3").removeprefix("NVIDIA "))
        except UserError:
            yield Row(f"GPU {number} ({name})", ", ".join(f"{key} {value:,.0f}" for key, value in found.items()))
            continue
        for what, key, best, share, unit in (
            ("bf16 product", "half_tflops", card.half_tflops, _MATMUL, "TFLOP/s"),
            ("TF32 product", "tflops", card.tflops, _MATMUL, "TFLOP/s"),
            ("copy", "gb_s", card.gb_s, _COPY, "GB/s"),
        ):
            value = f"{found[key]:,.0f} {unit}, {found[key] / best:.0%} of the data sheet's {best:,.0f}"
            good = found[key] >= share * best
            yield judged(f"GPU {number}: {what}", value, f"at least {share:.0%}", good, found[key])


def _cpu_ceilings() -> Iterator[Row]:
    a = torch.randn(768, 768)
    rate = 2 * 768**3 / _best(lambda: a @ a) / 1e9
    yield Row("fp32 product on the CPU", f"{rate:,.0f} GFLOP/s with {torch.get_num_threads()} threads", rate=rate)
    data = torch.empty(2**26, dtype=torch.uint8)
    there = torch.empty_like(data)
    rate = 2 * data.nbytes / _best(lambda: there.copy_(data)) / 1e9
    yield Row("copy in memory", f"{rate:,.1f} GB/s", rate=rate)


def _best(action: Any, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return min(times)


def step_table(settings: Settings) -> Iterator[Row]:
    """Images/s of a training step by precision, way and batch, and its memory against the estimate."""
    if settings.device != "cuda":
        yield skipped("step table", "requires a GPU; see: pipeline bench step")
        return
    from pipeline.config import parse_config
    from pipeline.insight.bench.precision import one_step_s
    from pipeline.insight.estimate.memory import Tracer, step_memory

    end = time.monotonic() + 0.8 * settings.seconds
    for precision in ("bf16", "fp16"):
        options = ["--model.name", "resnet152", "--train.precision", precision]
        memory = step_memory(Tracer(parse_config(options), 1000), 64)
        for compiled in (False, True):
            for batch in (64, 128, 256, 512):
                what = f"resnet152, {precision}, {'compiled' if compiled else 'eager'}, {batch} images"
                if time.monotonic() > end:
                    yield skipped(what, "no time left; give more --minutes")
                    continue
                try:
                    seconds, mib = one_step_s("resnet152", 224, batch, precision, compiled)
                except torch.OutOfMemoryError:
                    yield Row(what, "out of memory")
                    continue
                finally:
                    torch.cuda.empty_cache()
                expected = memory.allocated_mib(batch)
                value = f"{batch / seconds:,.0f} images/s, {mib:,.0f} MiB; estimated {expected:,.0f}"
                if compiled:  # a compiled step may need less
                    yield Row(what, value)
                else:
                    near = abs(mib - expected) <= _MEMORY * mib
                    yield judged(what, value, f"memory within {_MEMORY:.0%}", near)


def checkpoint_stall(settings: Settings) -> Iterator[Row]:
    """How long a step waits while its state is copied."""
    from pipeline.insight.bench.checkpoint import checkpoint

    model = "resnet152" if settings.device == "cuda" else "resnet18"
    result = checkpoint(model, str(settings.scratch), 3, "cuda" if settings.device == "cuda" else "cpu")
    yield Row(f"{model}: a step waits", f"{result['stall_ms']['median']:,.1f} ms for {result['bytes']:,} bytes")
    yield Row(f"{model}: written behind it", f"{result['write_ms']['median']:,.0f} ms with hash and fsync")


def training(settings: Settings) -> Iterator[Row]:
    """The loader against what a step consumes, and the GPU's idle time, of a run over the data set."""
    if not settings.root:
        yield skipped("loader and idle time", "requires a data set: give --data.root")
        return
    from pipeline.insight.bench.train import main as bench_train

    options = ["--config", "resnet152", "--data.root", settings.root, "--train.device", settings.device]
    if settings.device == "cpu":
        options += ["--model.name", "resnet18", "--data.image_size", "64", "--train.global_batch_size", "16"]
        options += ["--steps", "2", "--rounds", "1", "--model.stochastic_depth", "0"]
    else:
        options += ["--train.global_batch_size", "256"]
    result = bench_train(options)
    if result is None:
        return
    yield from judge_training(result, settings.device == "cuda")


def judge_training(result: dict, on_gpu: bool) -> Iterator[Row]:
    """Rows from what `bench train` found."""
    yield Row("training", f"{result['images_per_s']:,.1f} images/s with the loader; {result['verdict']}")
    ratio = result["loader_images_per_s"] / result["step_images_per_s"]
    value = f"{result['loader_images_per_s']:,.0f} images/s, {ratio:.2f} x what a step consumes"
    idle = result["shares"]["data"]
    if on_gpu:
        yield judged("loader", value, f"at least {_LOADER:g} x", ratio >= _LOADER)
        yield judged("waiting for images", f"{idle:.1%} of a step", f"at most {_IDLE:.0%}", idle <= _IDLE)
    else:
        yield Row("loader", value)
