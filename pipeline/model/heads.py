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

_CLASSES = (3, 5)  # what a network is made for, to see what follows

BODY = "body"  #: as a pattern of --model.freeze: everything but the heads
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


def find_heads(model: ModelConfig | str) -> tuple[str, ...]:
    """Module names of a classifier's heads, auxiliary ones too: `fc`, `classifier.6`, `heads.head`, ... model: or its
    name. Raises UserError for a network in which nothing follows the number of classes."""
    config = ModelConfig(name=model) if isinstance(model, str) else model
    return _find_heads(ModelConfig(name=config.name, kwargs=config.kwargs))


def _find_heads(config: ModelConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key.rpartition(".")[0] for key in _follow_classes(config)))


@functools.cache
def _follow_classes(config: ModelConfig) -> dict[str, int | None]:
    """The parameters whose shape follows the number of classes -> which of their dimensions is that number, None where
    none is."""
    few, more = (
        {key: value.shape for key, value in make_without_data(config, classes).named_parameters()}
        for classes in _CLASSES
    )
    found = {}
    for key, shape in few.items():
        if shape != more.get(key):
            pairs = enumerate(zip(shape, more.get(key, ()), strict=False))
            found[key] = next((number for number, pair in pairs if pair == _CLASSES), None)
    if not found:
        raise UserError(
            f"--model.name {config.name}: no parameter's shape follows num_classes, so it has no head for the classes; "
            "let its last layer have num_classes outputs"
        )
    return found


def is_auxiliary(head: str) -> bool:
    """Is it a head of GoogLeNet's or Inception's auxiliary arms?"""
    return head.lower().startswith("aux")


def head_parameters(model: ModelConfig) -> dict[str, int | None]:
    """The parameters of all heads -> which of their dimensions is the number of classes; None: none is."""
    return _follow_classes(ModelConfig(name=model.name, kwargs=model.kwargs))


def count_outputs(model: ModelConfig, state: dict[str, torch.Tensor], source: str = "the checkpoint") -> int:
    """The number of classes of a state_dict of this network, from the main head's shape. Raises UserError, which begins
    with `source`, where it has no such head."""
    for key, number in head_parameters(model).items():
        if key in state and not is_auxiliary(key) and number is not None and number < state[key].ndim:
            return state[key].shape[number]
    heads = ", ".join(head or "a parameter of the network itself" for head in find_heads(model))
    raise UserError(f"{source} has no head of {model.name} ({heads}): it is of another network; name that one")


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
        if not head:
            raise UserError(
                f"--model.dropout {share}: the head of {config.name} is a parameter of the network itself, no layer; "
                "let the network drop values by itself"
            )
        if not is_auxiliary(head):
            model.get_submodule(head).register_forward_pre_hook(DropInput(share, rows=False))
