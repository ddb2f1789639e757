"""Stochastic depth and BlurPool: what they compute, and that names of weights stay torchvision's."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.build import build_model
from pipeline.model.regularize import Blur, BlurMaxPool


def build(name: str = "resnet18", **settings) -> nn.Module:
    torch.manual_seed(3)
    return build_model(ModelConfig(name=name, **settings), 10)


def test_depth_drops_whole_branches_of_some_samples_and_scales_up_the_rest():
    model = build(stochastic_depth=0.5, zero_init_residual=False)
    block, plain = model.layer4[1], build().layer4[1]  # the last block: its rate is the whole rate
    plain.load_state_dict(block.state_dict())
    for part in (block, plain):
        part.train()
    x = torch.rand(64, 512, 3, 3)
    torch.manual_seed(1)
    seen, whole = block(x), plain(x)
    branch = plain.bn2(plain.conv2(plain.relu(plain.bn1(plain.conv1(x)))))
    dropped = torch.tensor([torch.equal(a, b) for a, b in zip(seen, torch.relu(x), strict=True)])
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(seen[~dropped], torch.relu(2 * branch + x)[~dropped])
    assert not torch.allclose(seen, whole)
    again = build(stochastic_depth=0.5).layer4[1].train()
    again.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    assert torch.equal(again(x), seen)  # a function of the seed


def test_depth_grows_linearly_and_sleeps_in_evaluation():
    rates = []
    model = build("resnet50", stochastic_depth=0.3)
    for module in model.modules():
        rates += [hook.share for hook in module._forward_hooks.values()]
    assert rates == pytest.approx([0.3 * n / 15 for n in range(1, 16)])
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(model.eval()(images), build("resnet50").eval()(images))


def test_networks_with_stochastic_depth_of_their_own_take_the_rate():
    with torch.device("meta"):
        layers = [m for m in build("convnext_tiny", stochastic_depth=0.4).modules() if isinstance(m, StochasticDepth)]
    shares = [hook.share for layer in layers for hook in layer._forward_hooks.values()]
    assert len(layers) == 18 and shares == pytest.approx([0.4 * n / 17 for n in range(1, 18)])


@pytest.mark.parametrize("name", ["vit_b_32", "regnet_y_400mf", "mobilenet_v2", "mobilenet_v3_small", "swin_t"])
def test_depth_knows_torchvisions_residual_blocks(name):
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # regnet computes its widths with tensors
        build(name, stochastic_depth=0.1)


def test_a_network_without_residual_blocks_is_refused():
    with torch.device("meta"), pytest.raises(UserError, match=r"stochastic_depth 0.1.*vgg11"):
        build("vgg11", stochastic_depth=0.1)


def test_blur_is_the_binomial_filter():
    seen = Blur(2)(torch.eye(5).view(1, 1, 5, 5) * 16)
    expected = torch.tensor([[5.0, 1, 0], [1, 6, 1], [0, 1, 5]]).view(1, 1, 3, 3)
    torch.testing.assert_close(seen, expected)


def test_convolutions_see_blurred_inputs_and_the_image_does_not():
    model, plain = build(blurpool="convs").eval(), build().eval()
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 64, 64)
    stem = [part.conv1(images) for part in (model, plain)]
    assert torch.equal(*stem)
    x = torch.rand(2, 64, 16, 16)
    block, without = model.layer2[0], plain.layer2[0]
    torch.testing.assert_close(block.conv1(x), without.conv1(Blur()(x)))
    torch.testing.assert_close(block.downsample(x), without.downsample(Blur()(x)))
    assert sum(isinstance(m, Blur) for m in model.modules()) == 6  # two for each of the three strided stages


def reflected(x: torch.Tensor) -> torch.Tensor:
    """Zhang 2019 and timm's BlurPool2d: a frame of the mirror, then the filter with stride 2."""
    return nn.functional.conv2d(
        nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), Blur().kernel.expand(x.shape[1], 1, 3, 3), None, 2, 0,
        groups=x.shape[1],
    )  # fmt: skip


def test_max_pooling_is_blurred_where_asked():
    model = build(blurpool="all")
    assert isinstance(model.maxpool, BlurMaxPool) and not isinstance(build(blurpool="convs").maxpool, BlurMaxPool)
    x = torch.rand(1, 4, 8, 8)
    dense = nn.functional.max_pool2d(x, 3, 1, 1)
    torch.testing.assert_close(model.maxpool(x), reflected(dense))
    assert model.layer2[0].conv1.blur.reflect and not build(blurpool="convs").layer2[0].conv1.blur.reflect
    assert model.state_dict().keys() == torchvision.models.resnet18(num_classes=10).state_dict().keys()


@pytest.mark.parametrize(("kernel", "padding", "ceil"), [(3, 1, False), (3, 0, True), (2, 0, True), (3, 1, True)])
def test_a_blurred_pool_keeps_the_pools_size(kernel, padding, ceil):
    """With ceil_mode too, which GoogLeNet's and SqueezeNet's pools have."""
    pool = nn.MaxPool2d(kernel, 2, padding, ceil_mode=ceil)
    for height, width in [(5, 8), (6, 7), (13, 4), (112, 111), (3, 9)]:
        x = torch.randint(256, (2, 3, height, width)).float()  # whole numbers: their weighted sums are exact
        seen = BlurMaxPool(pool)(x)
        assert seen.shape == pool(x).shape, (height, width)
        assert seen.amin() >= x.amin() and seen.amax() <= x.amax()


def test_efficientnets_depth_is_its_papers():
    """Block i of n is left out with probability rate * i / n, not i / (n - 1)."""
    with torch.device("meta"):
        own = [m.p for m in torchvision.models.efficientnet_b0().modules() if isinstance(m, StochasticDepth)]
        model = build("efficientnet_b0", stochastic_depth=0.2)
    shares = [m for m in model.modules() if isinstance(m, StochasticDepth)]
    assert [hook.share for m in shares for hook in m._forward_hooks.values()] == pytest.approx(own[1:])
