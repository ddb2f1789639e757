"""Stochastic depth and BlurPool for torchvision's networks, by hooks: names in state_dicts stay torchvision's."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional
from torchvision.models.efficientnet import EfficientNet
from torchvision.models.mobilenetv2 import InvertedResidual as InvertedResidualV2
from torchvision.models.mobilenetv3 import InvertedResidual as InvertedResidualV3
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import StochasticDepth

from pipeline.errors import UserError
from pipeline.model.drops import Drop

#: kind of residual block -> the parts whose output is added to the shortcut
_BRANCHES = {
    BasicBlock: ("bn2",),
    Bottleneck: ("bn3",),
    ResBottleneckBlock: ("f",),
    InvertedResidualV2: ("conv",),
    InvertedResidualV3: ("block",),
    EncoderBlock: ("dropout", "mlp"),
}
_MIN_CHANNELS = 16  # an image itself is not blurred (FFCV, Composer)


def _blocks(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The branches of each residual block, block by block from the input."""
    for module in model.modules():
        names = _BRANCHES.get(type(module))
        if isinstance(module, StochasticDepth):
            yield [module]
        elif names and getattr(module, "use_res_connect", True):
            yield [getattr(module, name) for name in names]


def add_stochastic_depth(model: nn.Module, name: str, rate: float) -> None:
    """Drop whole residual branches in training, sample by sample (Huang et al. 2016): the first block's never, the
    last one's with probability `rate`, linearly in between (as timm does for ResNets).

    Networks that torchvision gives stochastic depth get this rate instead of their own; EfficientNet's block i of n has
    rate * i / n, as torchvision and its paper's code have it. Raises UserError for a network
    without residual blocks that are known.
    """
    blocks = list(_blocks(model))
    if not blocks:
        raise UserError(f"--model.stochastic_depth {rate}: no residual block is known in {name}; leave it at 0")
    for number, branches in enumerate(blocks):
        last = len(blocks) if isinstance(model, EfficientNet) else max(1, len(blocks) - 1)
        share = rate * number / last
        for branch in branches:
            if isinstance(branch, StochasticDepth):
                branch.p = share
            elif share:
                branch.register_forward_hook(Drop(share, rows=True))


class Blur(nn.Module):
    """[1 2 1] x [1 2 1] / 16 over each channel; keeps every `stride`-th value.

    reflect: beyond the border lies the image's mirror (Zhang 2019, timm), else zeros (FFCV, Composer).
    """

    kernel: torch.Tensor

    def __init__(self, stride: int = 1, reflect: bool = False):
        super().__init__()
        self.stride, self.reflect = stride, reflect
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (torch.outer(line, line) / 16).view(1, 1, 3, 3), persistent=False)

    def forward(self, x: torch.Tensor, more: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """x: [B, C, H, W]. more: rows and columns added below and to the right, copies of the last ones."""
        channels, padding = x.shape[1], 1
        if any(more):
            x = functional.pad(x, (0, more[1], 0, more[0]), mode="replicate")
        if self.reflect and min(x.shape[-2:]) > 1:
            x, padding = functional.pad(x, (1, 1, 1, 1), mode="reflect"), 0
        return functional.conv2d(x, self.kernel.expand(channels, 1, 3, 3), None, self.stride, padding, groups=channels)


class BlurMaxPool(nn.Module):
    """Max pooling of stride 1, then `Blur` of the pool's stride (Zhang 2019, section 3.2). The output has the size that
    the pool's has, with ceil_mode too."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.kernel_size, self.padding, self.ceil_mode = _one(pool.kernel_size), _one(pool.padding), pool.ceil_mode
        self.blur = Blur(_one(pool.stride), reflect=True)

    def _missing(self, size: int, dense: int) -> int:
        """Rows that the blur needs beyond `dense`, the output of stride 1 for `size` rows, for one more output row."""
        stride = self.blur.stride
        floor = (dense - 1) // stride + 1
        one_more = (dense - 1) % stride and floor * stride < size + self.padding  # the window begins inside
        return stride - (dense - 1) % stride if self.ceil_mode and one_more else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dense = functional.max_pool2d(x, self.kernel_size, 1, self.padding)
        more = [self._missing(*sizes) for sizes in zip(x.shape[-2:], dense.shape[-2:], strict=True)]
        return self.blur(dense, (more[0], more[1]))


def _one(stride: int | tuple[int, ...]) -> int:
    return max(stride) if isinstance(stride, tuple) else stride


def _blur_input(conv: nn.Conv2d, inputs: tuple) -> tuple:
    """A forward pre-hook of convolutions that have a `blur`."""
    blur = conv.blur
    assert isinstance(blur, Blur)
    return blur(inputs[0]), *inputs[1:]


def add_blurpool(model: nn.Module, name: str, pools: bool) -> None:
    """Blur what strided convolutions of at least 16 channels see (as FFCV and Composer). With `pools`, put
    `BlurMaxPool` in place of strided max pooling and pad by reflection (as Zhang and timm). Raises UserError where
    there is neither.
    """
    found = False
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and _one(module.stride) > 1 and module.in_channels >= _MIN_CHANNELS:
            module.blur = Blur(reflect=pools)  # its buffer is in no state_dict
            module.register_forward_pre_hook(_blur_input)
            found = True
        for key, child in list(module.named_children()):
            if pools and isinstance(child, nn.MaxPool2d) and _one(child.stride) > 1:
                setattr(module, key, BlurMaxPool(child))
                found = True
    if not found:
        what, more = ("layer", "") if pools else ("convolution", ", or all, for pooling too")
        raise UserError(f"--model.blurpool: {name} has no strided {what} to blur; give none{more}")
