"""A network's heads, found by what they do: the layers whose shape follows the number of classes. And what hangs on
knowing them: drop-out before the head, a frozen body.
"""

import fnmatch
import functools

import torch
from torch import nn

from pipeline.command import split_list
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.drops import DropInput
from pipeline.model.networks import make_without_data

BODY = "body"  #: as a pattern of --model.freeze: everything but the heads
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


def find_heads(model: ModelConfig | str) -> tuple[str, ...]:
    """Module names of a classifier's heads, auxiliary ones too: `fc`, `classifier.6`, `heads.head`, ... model: or its
    name. Raises UserError for a network in which nothing follows the number of classes."""
    config = ModelConfig(name=model) if isinstance(model, str) else model
    return _find_heads(ModelConfig(name=config.name, kwargs=config.kwargs))


@functools.cache
def _find_heads(config: ModelConfig) -> tuple[str, ...]:
    shapes = []
    for classes in (3, 5):
        model = make_without_data(config, classes)
        shapes.append({key: value.shape for key, value in model.named_parameters()})
    differing = [key for key, shape in shapes[0].items() if shape != shapes[1].get(key)]
    if not differing:
        raise UserError(
            f"--model.name {config.name}: no parameter's shape follows num_classes, so it has no head for the classes; "
            "let its last layer have num_classes outputs"
        )
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in differing))


def is_auxiliary(head: str) -> bool:
    """Is it a head of GoogLeNet's or Inception's auxiliary arms?"""
    return head.lower().startswith("aux")


def count_outputs(model: ModelConfig | str, state: dict[str, torch.Tensor]) -> int:
    """The number of classes of a state_dict of this network, from the main head's shape."""
    return len(next(state[f"{head}.weight"] for head in find_heads(model) if not is_auxiliary(head)))


def in_heads(parameter: str, heads: tuple[str, ...]) -> bool:
    """Does a parameter's name belong to one of the heads, or to an auxiliary arm?"""
    return is_auxiliary(parameter) or parameter.rpartition(".")[0] in heads


def freeze(model: nn.Module, config: ModelConfig, patterns: str) -> None:
    """Take the named parameters out of the training.

    patterns: separated by commas; "body" is everything but the heads, anything else a pattern like `layer1.*`.
    Raises UserError for a pattern that names nothing, or if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in split_list(patterns):
        if pattern == BODY:
            heads = find_heads(config)
            chosen = [key for key in parameters if not in_heads(key, heads)]
        else:
            chosen = fnmatch.filter(parameters, pattern)
        if not chosen:
            some = ", ".join(list(parameters)[:3])
            raise UserError(f"--model.freeze {pattern} names no parameter of {config.name}; its names are like {some}")
        for key in chosen:
            parameters[key].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"--model.freeze {patterns} leaves nothing to train; leave the head out")


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """The normalization layers all of whose own parameters are frozen: their statistics are to stay, too."""

    def is_frozen(module: nn.Module) -> bool:
        own = list(module.parameters(recurse=False))
        return bool(own) and not any(parameter.requires_grad for parameter in own)

    return [module for module in model.modules() if isinstance(module, NORMS) and is_frozen(module)]


def drop_before_head(model: nn.Module, config: ModelConfig, share: float) -> None:
    """Drop this share of the values that go into the main head, in training only."""
    for head in find_heads(config):
        if not is_auxiliary(head):
            model.get_submodule(head).register_forward_pre_hook(DropInput(share, rows=False))
