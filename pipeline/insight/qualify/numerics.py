"""Losses and gradients of three steps, in each precision and way of execution, against float64 on the CPU."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from pipeline.config import Config, DataConfig, ModelConfig, OptimConfig, RawConfig, TrainConfig
from pipeline.insight.qualify.rows import Row, Settings, judged
from pipeline.loader.stream import Batch
from pipeline.model.build import build_model
from pipeline.training.ranks.world import World, start_world
from pipeline.training.step import TrainStep, exchange_gradients

_STEPS, _BATCH, _SIZE, _CLASSES, _LR = 3, 32, 64, 10, 0.001
#: precision -> (relative error of a loss, cosine of the first step's gradient with the exact one). BatchNorm over a few
#: pixels multiplies rounding: in bf16 the cosine is 0.94 on a CPU.
BOUNDS = {"fp32": (1e-4, 0.9999), "tf32": (5e-3, 0.995), "bf16": (5e-2, 0.9), "fp16": (1e-2, 0.98)}

Found = tuple[list[float], torch.Tensor]


def numerics(settings: Settings) -> Iterator[Row]:
    """Every way that the training step can be executed on this device."""
    world = start_world(TrainConfig(device="cuda" if settings.device == "cuda" else "cpu"))
    images = torch.randint(0, 256, (_BATCH, _SIZE, _SIZE, 3), dtype=torch.uint8, generator=_generator())
    targets = torch.randint(0, _CLASSES, (_BATCH,), generator=_generator())
    torch.manual_seed(0)
    initial = build_model(_config("fp32", "eager").model, _CLASSES)
    losses, gradient = exact(initial, images, targets)
    yield Row("float64 on the CPU", _text(losses))
    precisions = list(BOUNDS) if settings.device == "cuda" else ["fp32", "bf16"]
    ways = ["eager", "DDP of one"] + (["compiled", "CUDA graphs"] if settings.device == "cuda" else [])
    for precision in precisions:
        for way in ways:
            what = f"{precision}, {way}"
            try:
                found, got = trained(copy.deepcopy(initial), images, targets, precision, way, world)
            except Exception as error:  # one way that breaks is a row, and the others are still of interest
                yield Row(what, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", "runs", "FAIL")
                continue
            worst = max(abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True))
            cosine = nn.functional.cosine_similarity(got, gradient, 0).item()
            bound, least = BOUNDS[precision]
            value = f"losses {_text(found)}, off by {worst:.1e}; gradient's cosine {cosine:.6f}"
            yield judged(what, value, f"at most {bound:g}; at least {least:g}", worst <= bound and cosine >= least)


def exact(initial: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> Found:
    """(losses of the steps, first gradient) of plain gradient descent in float64."""
    model, data = copy.deepcopy(initial).double().train(), _config("fp32", "eager").data
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (data.mean, data.std))
    pixels = (images.permute(0, 3, 1, 2).double() / 255 - mean) / std
    losses, first = [], torch.zeros(0)
    for step in range(_STEPS):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(pixels), targets)
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        first = first if step else torch.cat([gradient.flatten() for gradient in gradients])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(_LR * parameter.grad)
    return losses, first


def trained(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, precision: str, way: str, world: World
) -> Found:
    """The same by this project's step."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    config = _config("fp32" if precision == "tf32" else precision, way)
    step = TrainStep(model, config, world)
    if way == "DDP of one":
        step.exchanging = step.forward = exchange_gradients(step.network, config.train, world.device)
    device = world.device
    batch = Batch(images.to(device), targets.to(device), torch.arange(_BATCH, device=device))
    losses, first = [], torch.zeros(0)
    for number in range(_STEPS):
        losses.append(step(batch, _LR, number)[0].item())
        if number == 0:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            first = torch.cat([gradient.double().cpu().flatten() for gradient in gradients])
    return losses, first


def _config(precision: str, way: str) -> Config:
    train = TrainConfig(
        global_batch_size=_BATCH,
        precision=precision,  # type: ignore[arg-type] # a key of BOUNDS
        compile=way in ("compiled", "CUDA graphs"),
        cuda_graphs=way == "CUDA graphs",
    )
    return RawConfig(
        data=DataConfig(image_size=_SIZE),
        model=ModelConfig(name="resnet18", num_classes=_CLASSES),
        optim=OptimConfig(momentum=0.0, nesterov=False, weight_decay=0.0),
        train=train,
    ).resolve()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _text(losses: list[float]) -> str:
    return " ".join(f"{loss:.6f}" for loss in losses)
