"""Models, optimizer groups, schedules and scores against values worked out by hand."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import resnet18

from pipeline.config import DataConfig, ModelConfig, OptimConfig, RawConfig, ScheduleConfig, TrainConfig
from pipeline.errors import UserError
from pipeline.model.build import Normalized, build_model, count_parameters
from pipeline.training.evaluate import score
from pipeline.training.optim.lr_schedule import Schedule, peak_lr
from pipeline.training.optim.optimizer import make_optimizer, parameter_groups
from pipeline.training.ranks.world import World
from pipeline.training.step import TrainStep

CPU = torch.device("cpu")


def test_resnet152_is_torchvisions():
    model = build_model(ModelConfig(name="resnet152"), 1000)
    assert count_parameters(model) == 60_192_808


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "mobilenet_v3_small", "vit_b_32", "googlenet"])
def test_any_classifier_gets_a_head_for_the_classes(name):
    model = build_model(ModelConfig(name=name), 7).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 7)


def test_an_unknown_model_is_one_line_with_a_guess():
    with pytest.raises(UserError, match=r"--model.name resnet125 .* resnet152"):
        build_model(ModelConfig(name="resnet125"), 10)


def test_zero_init_residual_starts_blocks_as_the_identity():
    model = build_model(ModelConfig(name="resnet50", zero_init_residual=True), 10)
    assert all(block.bn3.weight.count_nonzero() == 0 for block in model.layer2)
    assert model.layer2[0].bn2.weight.count_nonzero() > 0
    with pytest.raises(UserError, match="zero_init_residual"):
        build_model(ModelConfig(name="vgg11", zero_init_residual=True), 10)


def test_weight_decay_goes_by_module_type():
    model = resnet18()
    weights, norms = parameter_groups(model, OptimConfig(weight_decay=0.5, norm_weight_decay=0.25))
    kinds = {id(p): (m, n) for m in model.modules() for n, p in m.named_parameters(recurse=False)}
    assert (weights["weight_decay"], norms["weight_decay"]) == (0.5, 0.25)
    assert all(isinstance(kinds[id(p)][0], nn.Conv2d | nn.Linear) for p in weights["params"])
    assert all(isinstance(kinds[id(p)][0], nn.BatchNorm2d) or kinds[id(p)][1] == "bias" for p in norms["params"])
    assert len(weights["params"]) + len(norms["params"]) == len(list(model.parameters()))
    assert id(model.layer2[0].downsample[1].weight) in {id(p) for p in norms["params"]}  # no 'bn' in its name


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizers_take_a_step(name):
    layer = nn.Linear(3, 1)
    optimizer = make_optimizer(layer, OptimConfig(name=name, weight_decay=0, momentum=0))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.5)  # SGD: gradient 1; AdamW: its sign, once


def test_step_schedule_with_goyals_warm_up():
    config = ScheduleConfig(name="step", epochs=90, warmup_epochs=5, warmup_start=0.1, milestones=(30, 60))
    peak = peak_lr(OptimConfig(lr=0.1, lr_batch_size=256), 8192)
    assert peak == pytest.approx(3.2)
    schedule = Schedule(config, peak, steps_per_epoch=100)
    assert schedule.total_steps == 9000
    expected = {0: 0.32, 250: 0.32 + 2.88 / 2, 500: 3.2, 2999: 3.2, 3000: 0.32, 5999: 0.32, 6000: 0.032, 8999: 0.032}
    for step, lr in expected.items():
        assert schedule.lr(step) == pytest.approx(lr), step


def test_cosine_schedule_ends_at_the_minimum():
    config = ScheduleConfig(name="cosine", epochs=10, warmup_epochs=2, warmup_start=0.0, min_lr=0.01)
    schedule = Schedule(config, 1.0, steps_per_epoch=10)
    assert schedule.lr(0) == 0
    assert schedule.lr(20) == 1.0
    assert schedule.lr(60) == pytest.approx(0.01 + 0.99 * 0.5)
    assert schedule.lr(99) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 79 / 80)) / 2)


def test_normalising_is_torchvisions():
    images = torch.randint(0, 256, (2, 8, 9, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    seen = Normalized(nn.Identity(), mean, std, channels_last=True)(images)
    expected = (images.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(seen, expected)
    assert seen.is_contiguous(memory_format=torch.channels_last)


def test_score_counts_first_and_first_five():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    loss, top1, top5, images = score(logits, torch.tensor([0, 4, 5])).tolist()
    assert (top1, top5, images) == (1, 2, 3)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, torch.tensor([0, 4, 5]), reduction="sum").item())
    assert score(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))[2] == 1  # two classes only


@pytest.mark.parametrize(("device", "images"), [("cuda", 24), ("cpu", 2)])
def test_the_warm_up_takes_the_real_micro_batch_on_a_gpu(device, images):
    """There convolutions are tuned for its size, and memory that is short is found. (Fake tensors stand for the GPU's;
    a CPU has nothing to tune.)"""
    data, train = DataConfig(image_size=64), TrainConfig(global_batch_size=48, micro_batch_size=24)
    config = RawConfig(model=ModelConfig(name="resnet18"), data=data, train=train).resolve()
    step, seen = TrainStep(build_model(config.model, 10), config, World()), []
    step.device = torch.device(device)

    def forward(pixels, *_):
        seen.append((tuple(pixels.shape), pixels.device.type))
        return torch.zeros(len(pixels), 10, requires_grad=True)

    step.forward, step.loss = forward, lambda logits, targets: logits.sum()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step.warm_up()
    assert seen == [((images, 64, 64, 3), device)] * 2
