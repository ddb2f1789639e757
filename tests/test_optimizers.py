"""LAMB and LARS against steps computed by hand, clipping, groups by type and depth, and updates that are left out."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18

from pipeline.config import ModelConfig, OptimConfig
from pipeline.config.optim import OPTIMIZER_NAMES
from pipeline.model.depth import layer_numbers
from pipeline.model.heads import find_heads
from pipeline.model.meta_init import meta_init
from pipeline.model.networks import make_without_data
from pipeline.training.optim.clipping import adaptive_gradient_clip, clip_norm
from pipeline.training.optim.optimizer import OPTIMIZERS, make_optimizer, parameter_groups


def layer(weights: list[float], bias: float = 0.5) -> nn.Linear:
    made = nn.Linear(len(weights), 1)
    made.weight.data, made.bias.data = torch.tensor([weights]), torch.tensor([bias])
    return made


def take(optimizer: torch.optim.Optimizer, model: nn.Linear, gradients: list[float], bias: float, lr: float) -> None:
    model.weight.grad, model.bias.grad = torch.tensor([gradients]), torch.tensor([bias])
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    optimizer.step()


def norm(values) -> float:
    return math.sqrt(sum(value * value for value in values))


def test_lamb_takes_the_papers_steps():
    """Two steps of algorithm 2 with bias correction, in plain numbers."""
    b1, b2, eps, decay, lr = 0.9, 0.99, 1e-6, 0.1, 0.05
    config = OptimConfig(name="lamb", betas=(b1, b2), eps=eps, weight_decay=decay)
    model = layer([3.0, -4.0])
    optimizer = make_optimizer(model, config)
    x, bias = [3.0, -4.0], 0.5
    m, v, bias_m, bias_v = [0.0, 0.0], [0.0, 0.0], 0.0, 0.0
    for t, (gradients, bias_gradient) in enumerate([([0.2, 0.4], 2.0), ([-1.0, 0.1], -3.0)], 1):
        take(optimizer, model, gradients, bias_gradient, lr)
        m = [b1 * a + (1 - b1) * g for a, g in zip(m, gradients, strict=True)]
        v = [b2 * a + (1 - b2) * g * g for a, g in zip(v, gradients, strict=True)]
        r = [(a / (1 - b1**t)) / (math.sqrt(b / (1 - b2**t)) + eps) for a, b in zip(m, v, strict=True)]
        u = [a + decay * w for a, w in zip(r, x, strict=True)]
        x = [w - lr * norm(x) / norm(u) * change for w, change in zip(x, u, strict=True)]
        bias_m, bias_v = b1 * bias_m + (1 - b1) * bias_gradient, b2 * bias_v + (1 - b2) * bias_gradient**2
        bias -= lr * (bias_m / (1 - b1**t)) / (math.sqrt(bias_v / (1 - b2**t)) + eps)  # no decay: no trust ratio
        assert model.weight[0].tolist() == pytest.approx(x, rel=1e-5)
        assert model.bias.item() == pytest.approx(bias, rel=1e-5)


def test_lars_takes_the_papers_steps():
    """Two steps of algorithm 1 with another rate each, which tells its momentum from torch's."""
    momentum, eta, decay = 0.9, 0.02, 0.1
    config = OptimConfig(name="lars", momentum=momentum, trust_coefficient=eta, weight_decay=decay)
    model = layer([3.0, -4.0])
    optimizer = make_optimizer(model, config)
    w, v, bias, bias_v = [3.0, -4.0], [0.0, 0.0], 0.5, 0.0
    for lr, gradients, bias_gradient in ((2.0, [0.3, 0.4], 0.1), (0.5, [-1.0, 0.1], 0.2)):
        take(optimizer, model, gradients, bias_gradient, lr)
        local = eta * norm(w) / (norm(gradients) + decay * norm(w))
        v = [momentum * a + lr * local * (g + decay * b) for a, g, b in zip(v, gradients, w, strict=True)]
        w = [a - b for a, b in zip(w, v, strict=True)]
        bias_v = momentum * bias_v + lr * bias_gradient
        bias -= bias_v
        assert model.weight[0].tolist() == pytest.approx(w, rel=1e-5)
        assert model.bias.item() == pytest.approx(bias, rel=1e-5)


def test_the_choices_of_the_option_are_those_that_can_be_built():
    """In the configuration, the registry and the documentation."""
    assert set(OPTIMIZER_NAMES) == set(OPTIMIZERS)
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    section = page.partition("## Optimizers and losses")[2].partition("\n## ")[0]
    assert all(f"`{name}`" in section for name in OPTIMIZER_NAMES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_left_out_on_the_devices_own_judgement(name):
    """With found_inf, a step on NaN changes nothing, first or later; what follows is as if it had not been."""
    config = OptimConfig(name=name, weight_decay=0.1, adapt_all=name in ("lamb", "lars"))
    disturbed, calm = layer([3.0, -4.0]), layer([3.0, -4.0])
    optimizers = make_optimizer(disturbed, config), make_optimizer(calm, config)
    nan = float("nan")
    for bad, gradients in ((True, [nan, 1.0]), (False, [0.2, 0.4]), (True, [1.0, nan]), (False, [0.1, -0.3])):
        optimizers[0].found_inf = torch.tensor(float(bad))
        take(optimizers[0], disturbed, gradients, nan if bad else 1.0, 0.1)
        if not bad:
            optimizers[1].found_inf = torch.tensor(0.0)
            take(optimizers[1], calm, gradients, 1.0, 0.1)
        assert torch.equal(disturbed.weight, calm.weight) and torch.equal(disturbed.bias, calm.bias)


class ValuesRead(TorchDispatchMode):
    """Counts the times that the host asks a tensor for its value, for which it would wait on a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_waits_for_nothing_in_an_update(name):
    model = layer([1.0, 2.0])
    optimizer = make_optimizer(model, OptimConfig(name=name, lr=0.1, weight_decay=0.1))
    optimizer.found_inf = torch.zeros(())
    with ValuesRead() as read:
        for _ in range(2):
            take(optimizer, model, [1.0, 2.0], 0.5, 0.1)
    assert read.count == 0


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_state_goes_on_from_where_it_was_saved(name):
    config = OptimConfig(name=name)
    whole = layer([3.0, -4.0])
    optimizer = make_optimizer(whole, config)
    take(optimizer, whole, [0.2, 0.4], 1.0, 0.1)
    cut = copy.deepcopy(whole)
    again = make_optimizer(cut, config)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, used in ((whole, optimizer), (cut, again)):
        take(used, model, [0.7, -0.1], 1.0, 0.1)
    assert torch.equal(whole.weight, cut.weight)


def test_nothing_to_adapt_by_is_a_plain_step():
    """Weights or gradients of zero must not make the layer's rate 0 or NaN."""
    for name in ("lamb", "lars"):
        model = layer([0.0, 0.0])
        optimizer = make_optimizer(model, OptimConfig(name=name, weight_decay=0.1))
        take(optimizer, model, [0.5, -0.5], 0.0, 0.1)
        assert model.weight.isfinite().all() and model.weight.abs().min() > 0


def test_clipping_by_the_norm_of_all_gradients():
    model = layer([1.0, 1.0])
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    clip_norm(list(model.parameters()), 10.0)
    assert model.bias.grad.item() == 4.0
    clip_norm(list(model.parameters()), 1.0)
    assert (model.weight.grad[0, 0].item(), model.bias.grad.item()) == pytest.approx((0.6, 0.8), rel=1e-5)


def test_adaptive_clipping_goes_unit_by_unit():
    model = nn.Linear(2, 3, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    model.weight.grad = torch.tensor([[0.0, 8.0], [0.3, 0.4], [0.0, 1.0]])
    adaptive_gradient_clip(
        list(model.parameters()), 0.2
    )  # a unit of norm 5 may have a gradient of norm 1, one at 0 of 0.0002
    expected = torch.tensor([[0.0, 1.0], [0.3, 0.4], [0.0, 0.0002]])
    torch.testing.assert_close(model.weight.grad, expected)
    filters = nn.Conv2d(2, 2, 3)
    filters.weight.data.fill_(1.0)
    filters.weight.grad = torch.stack([torch.ones(2, 3, 3), torch.full((2, 3, 3), 0.1)])
    filters.bias.data, filters.bias.grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    adaptive_gradient_clip(list(filters.parameters()), 0.2)
    torch.testing.assert_close(filters.weight.grad[:, 0, 0, 0], torch.tensor([0.2, 0.1]))
    torch.testing.assert_close(filters.bias.grad, torch.tensor([0.6, 0.8]))  # a vector is one unit


def test_biases_may_decay_though_norms_do_not():
    groups = parameter_groups(resnet18(), OptimConfig(weight_decay=0.5, norm_weight_decay=0.0, bias_weight_decay=0.5))
    undecayed = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert len(undecayed) == 2 * 20  # gamma and beta of each BatchNorm
    assert sum(len(group["params"]) for group in groups) == 62


def test_attentions_own_bias_is_a_bias_and_swins_table_of_positions_is_none():
    with meta_init():
        model = nn.Sequential(torchvision.models.vit_b_32().encoder, torchvision.models.swin_t().features[1])
    groups = parameter_groups(model, OptimConfig(weight_decay=0.5, norm_weight_decay=0.0, bias_weight_decay=0.0))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decays[id(p)] for name, p in model.named_parameters() if "in_proj" in name or "table" in name}
    assert {decay for name, decay in found.items() if name.endswith("in_proj_bias")} == {0.0}
    assert {decay for name, decay in found.items() if name.endswith(("in_proj_weight", "_table"))} == {0.5}


@pytest.mark.parametrize(
    ("name", "some", "last"),
    [
        ("resnet18", {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer2.1.bn2.weight": 4}, 9),
        ("vit_b_16", {"class_token": 0, "encoder.pos_embedding": 0, "conv_proj.bias": 0}, 13),
        ("densenet121", {"features.norm0.weight": 0, "features.denseblock1.denselayer2.conv2.weight": 2}, 62),
        (
            "googlenet",
            {"conv1.conv.weight": 0, "inception3a.branch2.0.conv.weight": 3, "inception3b.branch1.bn.bias": 4},
            14,
        ),
        ("regnet_y_400mf", {"stem.0.weight": 0, "trunk_output.block1.block1-0.proj.0.weight": 1}, 17),
        ("convnext_tiny", {"features.0.0.weight": 0, "features.1.0.block.0.weight": 1}, 22),
    ],
)
def test_layers_are_counted_from_the_input(name, some, last):
    with meta_init():
        model = torchvision.models.get_model(name)
    numbers = layer_numbers(model, find_heads(name))
    assert {key: numbers[key] for key in some} == some
    assert max(numbers.values()) == last and all(numbers[f"{head}.weight"] == last for head in find_heads(name))


@pytest.mark.parametrize(("name", "last"), [("convnext_tiny", 22), ("swin_tiny_patch4_window7_224", 16)])
def test_blocks_in_the_stages_of_timms_networks_are_layers(name, last):
    """A stage that counts as one layer would leave the input a rate a hundred times as high."""
    pytest.importorskip("timm", reason="networks of timm need the extra timm")
    config = ModelConfig(name=f"timm:{name}")
    numbers = layer_numbers(make_without_data(config, 10), find_heads(config))
    assert max(numbers.values()) == last == numbers["head.fc.weight"]


def test_a_stage_with_parameters_of_its_own_is_one_layer():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.conv = nn.Parameter(torch.ones(1)), nn.Conv2d(1, 1, 1)

    model = nn.Sequential(nn.Conv2d(1, 1, 1), Stage(), nn.Linear(1, 2))
    assert list(layer_numbers(model, ("2",)).values()) == [0, 0, 1, 1, 1, 2, 2]


def test_rates_fall_towards_the_input():
    model = resnet18()
    groups = parameter_groups(model, OptimConfig(layer_decay=0.5, body_lr_factor=0.1), ("fc",))
    factors = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
    assert factors[id(model.fc.bias)] == 1.0
    assert factors[id(model.layer4[1].conv1.weight)] == pytest.approx(0.1 * 0.5)
    assert factors[id(model.conv1.weight)] == pytest.approx(0.1 * 0.5**9)
