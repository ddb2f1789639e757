"""This project's step beside others' on the same card: plain loops of torchvision and timm, and the lecture's table."""

import importlib.util
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from pipeline.config import DataConfig, ModelConfig, RawConfig, TrainConfig
from pipeline.insight.bench.loops import wait_for
from pipeline.insight.qualify.rows import Row, Settings, judged, skipped
from pipeline.loader.stream import Batch
from pipeline.model.build import build_model
from pipeline.training.ranks.world import World
from pipeline.training.step import TrainStep, autocast

_SLOWER = 1.03  # this project's step may take so much of theirs
#: images at once -> MiB that the lecture's RTX A6000 showed for ResNet-152 with convolution biases, fp32
LECTURE_MIB = {
    1: 2460,
    2: 2638,
    36: 8576,
    48: 10930,
    64: 13854,
    80: 18166,
    96: 20558,
    120: 23884,
    128: 25118,
    256: 49140,
}
LECTURE_IMAGES_PER_S = 198  # its best


def plain_loops(settings: Settings) -> Iterator[Row]:
    """Forward, backward and update of the same network as their training scripts do it, in turns with ours. Channels
    last and bf16 in all, on resident images; theirs normalizes on the host, so that is left out of it."""
    on_gpu = settings.device == "cuda"
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    name, size, batch = ("resnet152", 224, 128) if on_gpu else ("resnet18", 32, 8)
    precision = "bf16" if on_gpu else "fp32"
    torch.backends.cudnn.benchmark = True
    networks: dict[str, Callable[[], nn.Module]] = {}
    networks["torchvision"] = lambda: build_model(ModelConfig(name=name), 1000)
    if importlib.util.find_spec("timm"):
        networks["timm"] = lambda: build_model(ModelConfig(name=f"timm:{name}"), 1000)
    else:
        yield skipped("timm", "not installed")
    for whose, make in networks.items():
        ours = _own_step(make(), size, batch, precision, device)
        theirs = _plain_step(make(), size, batch, precision, device)
        seen: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(6 if on_gpu else 3):
            for key, step in (("ours", ours), ("theirs", theirs)):
                seconds = _time(step, device, 5 if on_gpu else 1)
                if number:
                    seen[key].append(seconds)
        own, other = min(seen["ours"]), min(seen["theirs"])
        value = f"{batch / own:,.0f} images/s, {batch / other:,.0f} in a plain loop: {own / other:.2f} x the time"
        what = f"{name} of {whose}, {precision}, {batch} images"
        if on_gpu:
            yield judged(what, value, f"at most {_SLOWER:g} x", own <= _SLOWER * other, batch / own)
        else:
            yield Row(what, value, rate=batch / own)


def _time(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    wait_for(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        step()
    wait_for(device)
    return (time.perf_counter() - begun) / repeats


def _own_step(model: nn.Module, size: int, batch: int, precision: str, device: torch.device) -> Callable[[], object]:
    train = TrainConfig(global_batch_size=batch, precision=precision)  # type: ignore[arg-type]
    config = RawConfig(data=DataConfig(image_size=size), train=train).resolve()
    step = TrainStep(model, config, World(device=device))
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    targets = torch.randint(0, 1000, (batch,), device=device)
    resident = Batch(images, targets, torch.arange(batch, device=device))
    return lambda: step(resident, 0.01)


def _plain_step(model: nn.Module, size: int, batch: int, precision: str, device: torch.device) -> Callable[[], object]:
    network = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    targets, loss_of = torch.randint(0, 1000, (batch,), device=device), nn.CrossEntropyLoss()

    def step() -> None:
        with autocast(device, precision):
            loss = loss_of(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def lecture_table(settings: Settings) -> Iterator[Row]:
    """ResNet-152 in fp32 with 1 to 256 images: this card's memory and speed beside the lecture's."""
    if settings.device != "cuda":
        yield skipped("lecture's table", "requires a GPU")
        return
    from pipeline.insight.bench.precision import one_step_s

    end, best = time.monotonic() + 0.8 * settings.seconds, 0.0
    for batch, theirs in LECTURE_MIB.items():
        what = f"resnet152, fp32, {batch} images"
        if time.monotonic() > end:
            yield skipped(what, "no time left; give more --minutes")
            continue
        try:
            seconds, mib = one_step_s("resnet152", 224, batch, "fp32", False)
        except torch.OutOfMemoryError:
            yield Row(what, f"out of memory; the lecture's card showed {theirs:,} MiB")
            continue
        finally:
            torch.cuda.empty_cache()
        best = max(best, batch / seconds)
        value = f"{batch / seconds:,.0f} images/s, {mib:,.0f} MiB; the lecture's card showed {theirs:,} MiB"
        yield Row(what, value, rate=batch / seconds)
    yield Row("best", f"{best:,.0f} images/s; the lecture's {LECTURE_IMAGES_PER_S}")
