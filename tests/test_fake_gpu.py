"""What a step does on a GPU, without one: fake CUDA tensors have a shape, a type and a device, and no values. An
operation on tensors of two devices raises, and so does whatever reads a value, for which the host would wait.

Autograd's engine needs a real device, and torch's fused kernels know no fake tensors: these are stood in for.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import TINY
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from pipeline.augment.apply import GEOMETRIC, PixelOps
from pipeline.augment.mixing import neutral_erase_mix
from pipeline.augment.ops import apply_ops
from pipeline.augment.params import AugmentParams
from pipeline.augment.policies import OPS
from pipeline.config import Config, parse_config
from pipeline.loader.stream import Batch
from pipeline.model.build import build_model
from pipeline.model.pooling import adaptive_avg_pool2d_backward
from pipeline.training.evaluate import Tally, predict
from pipeline.training.ranks.consistency import bit_sum
from pipeline.training.ranks.world import World
from pipeline.training.step import TrainStep

GPU = torch.device("cuda", 0)
CLASSES, IMAGES = 10, 20


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, **_): ...
    def record(self): ...


def is_on_gpu(*found) -> bool:
    return all(item.device == GPU for item in tree_leaves(found) if isinstance(item, torch.Tensor))


def to_gpu(module: nn.Module) -> nn.Module:
    """In place of Module.to, which can't make a fake tensor of a real one."""
    for part in module.modules():
        for kind, make in ((part._parameters, nn.Parameter), (part._buffers, lambda tensor, _: tensor)):
            for name, old in kind.items():
                if old is not None and not old.is_cuda:
                    kind[name] = make(torch.empty(old.shape, dtype=old.dtype, device=GPU), old.requires_grad)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """Inside: fake tensors, and torch as it is with a GPU."""

    def only_on_gpu(*arguments, **named):
        assert is_on_gpu(arguments, named)

    kernels = ("_fused_sgd_", "_fused_adamw_", "_amp_update_scale_", "_amp_foreach_non_finite_check_and_unscale_")
    for name in kernels:
        monkeypatch.setattr(torch, name, only_on_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.amp.grad_scaler, "amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_, **__: to_gpu(module))
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)
    return FakeTensorMode


def make_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> TrainStep:
    step = TrainStep(to_gpu(build_model(config.model, CLASSES)), config, World(device=GPU))

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == GPU and loss.shape == () and loss.requires_grad
        for parameter in step.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return step


def batch_of(config: Config) -> Batch:
    size = config.data.image_size
    images = torch.zeros(IMAGES, size, size, 3, dtype=torch.uint8, device=GPU)
    numbers = torch.zeros(IMAGES, dtype=torch.int64, device=GPU)
    return Batch(images, numbers, numbers, None, neutral_erase_mix(config.augment, IMAGES, GPU))


MIXING = "--augment.mixup 0.2 --augment.cutmix 1 --augment.mix_group 4"


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--train.precision bf16 --optim.name lars --optim.agc 0.01",
        "--train.precision fp16 --optim.name adamw --optim.clip_norm 1 --train.micro_batch_size 5",
        f"--optim.name lamb --augment.random_erase 0.3 --ema.decay 0.9 {MIXING}",
        f"--optim.loss bce --optim.l1 0.1 --model.stochastic_depth 0.2 --model.dropout 0.1 {MIXING}",
    ],
    ids=["sgd", "lars", "fp16", "lamb", "bce"],
)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(options, gpu, monkeypatch):
    config = parse_config(["--config", str(TINY), "--data.root", "/data", *options.split()])
    with gpu():
        step = make_step(config, monkeypatch)
        step.warm_up()
        for number in (1, 2):
            assert is_on_gpu(step(batch_of(config), 0.1, number))
            step.average(number)
        kept = [network.state_dict() for network in step.networks.values()]
        assert is_on_gpu(kept, list(step.optimizer.state.values()))
        assert is_on_gpu([bit_sum(parameter) for parameter in step.model.parameters()])


def test_what_reads_a_value_would_be_found(gpu):
    with gpu(), pytest.raises(DataDependentOutputException):
        torch.ones((), device=GPU).item()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_augmentation_waits_for_nothing(mode, gpu):
    ops = np.arange(len(OPS), dtype=np.uint8)[:, None]
    assert {"equalize", "autocontrast", "hue", *GEOMETRIC} <= set(OPS)
    params = AugmentParams(ops, np.full(ops.shape, 0.5, np.float32), shifts=np.zeros((len(ops), 2), np.int32))
    with gpu():
        images = torch.zeros(len(ops), 32, 32, 3, dtype=torch.uint8, device=GPU)
        changed = apply_ops(images, PixelOps.of(params, 32, GPU), mode, (1, 2, 3))
        assert is_on_gpu(changed) and changed.shape == images.shape and changed.dtype == torch.uint8


def test_an_evaluation_stays_on_the_gpu(gpu):
    network = SimpleNamespace(out=lambda images: images.float().mean((1, 2))[:, :1].expand(-1, CLASSES))
    with gpu():
        tally = Tally(CLASSES, GPU)
        images = torch.zeros(IMAGES, 32, 32, 3, dtype=torch.uint8, device=GPU)
        targets = torch.zeros(IMAGES, dtype=torch.int64, device=GPU)
        tally.add(predict(network.out, images, targets, flip=True, crops=False), targets)
        assert is_on_gpu(tally.tensors())


def test_the_deterministic_gradient_of_pooling_stays_on_the_gpu(gpu):
    with gpu():
        gradient = torch.zeros(2, 3, 7, 7, device=GPU, dtype=torch.bfloat16)
        images = torch.zeros(2, 3, 9, 13, device=GPU, dtype=torch.bfloat16)
        found = adaptive_avg_pool2d_backward(gradient, images)
        assert is_on_gpu(found) and found.shape == images.shape and found.dtype == images.dtype
