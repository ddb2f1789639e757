"""Checkpoints of the original ResNet-50, -101 and -152 script, converted to torchvision's layout.

The network is the same; parameter names differ, and its convolutions have a bias, which the BatchNorm behind each
cancels: BN(conv + b) with running mean m is BN(conv) with running mean m - b. Folding b into m is exact in evaluation.
"""

import re

import torch

from pipeline.errors import UserError

#: blocks of the four stages -> torchvision's name
DEPTHS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}


def is_legacy(state: dict[str, torch.Tensor]) -> bool:
    """Is a state_dict in the original script's layout: `identity_downsample`, convolutions with bias?"""
    return any("identity_downsample" in key for key in state) or "conv1.bias" in state


def guess_model_name(state: dict[str, torch.Tensor]) -> str:
    """torchvision's name of a bottleneck ResNet, by its number of blocks. Raises UserError for any other network."""
    blocks_found = {match.groups() for key in state if (match := re.match(r"layer([1-4])\.(\d+)\.conv3\.weight$", key))}
    blocks = tuple(sum(stage == str(number) for stage, _ in blocks_found) for number in range(1, 5))
    if blocks not in DEPTHS:
        found = f"{blocks} bottleneck blocks" if any(blocks) else "no bottleneck blocks"
        raise UserError(f"the file has {found}, so it is not a ResNet-50, -101 or -152; name its network with --name")
    return DEPTHS[blocks]


def convert_to_torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state_dict with torchvision's names and the biases folded. Raises UserError for a bias without a BatchNorm
    behind it."""
    named = {key.replace("identity_downsample", "downsample"): value for key, value in state.items()}
    folded = dict(named)
    for key, bias in named.items():
        layer, _, kind = key.rpartition(".")
        weight = named.get(f"{layer}.weight")
        if kind != "bias" or weight is None or weight.dim() != 4:
            continue
        mean = re.sub(r"(^|\.)conv(\d)$", r"\1bn\2", layer)
        mean = re.sub(r"downsample\.0$", "downsample.1", mean) + ".running_mean"
        if mean not in named:
            raise UserError(f"{key} is the bias of a convolution without BatchNorm behind it; it can't be folded")
        folded[mean] = (folded[mean].double() - bias.double()).to(named[mean].dtype)
        del folded[key]
    return folded
