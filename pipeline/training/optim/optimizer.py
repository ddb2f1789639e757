"""The optimizer, with weight decay by module type and learning rates by depth."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from pipeline.config import Config, OptimConfig
from pipeline.config.networks import is_own
from pipeline.model.depth import layer_numbers
from pipeline.model.heads import NORMS, find_heads, in_heads
from pipeline.training.optim.lamb_lars import LAMB, LARS
from pipeline.training.optim.own import make_own_optimizer


def _trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Each trainable parameter once, with its name and the module that it is a part of."""
    seen = set()
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{place}.{name}" if place else name, parameter, module


def is_bias(name: str) -> bool:
    """Is a parameter of this name a bias? Attention calls one of its own `in_proj_bias`; Swin's position tables end
    otherwise."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def decay_of(config: OptimConfig, name: str, module: nn.Module) -> float:
    """The weight decay of a module's parameter: norms by the module's type, biases by their name."""
    if isinstance(module, NORMS):
        return config.norm_weight_decay
    if is_bias(name):
        given = config.bias_weight_decay
        return config.norm_weight_decay if given is None else given
    return config.weight_decay


def parameter_groups(model: nn.Module, config: OptimConfig, heads: tuple[str, ...] = ()) -> list[dict]:
    """The trained parameters by weight decay (`decay_of`) and `lr_factor`, what the schedule's rate is multiplied by.

    heads: names of the modules whose factor is 1; all before them have `body_lr_factor`, and `layer_decay` once
    for each layer from there to the head. The groups come in the order of their first parameter.
    """
    numbers = layer_numbers(model, heads) if config.layer_decay != 1 else {}
    last = max(numbers.values(), default=0)
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter, module in _trained_parameters(model):
        factor = config.body_lr_factor if config.body_lr_factor != 1 and not in_heads(name, heads) else 1.0
        if numbers:
            factor *= config.layer_decay ** (last - numbers[name])
        small = isinstance(module, NORMS) or is_bias(name)
        groups.setdefault((decay_of(config, name, module), factor, small), []).append(parameter)
    return [{"params": chosen, "weight_decay": d, "lr_factor": f} for (d, f, _), chosen in groups.items()]


def heads_for(config: Config) -> tuple[str, ...]:
    """The heads' names, where the optimizer treats them otherwise than the rest; () where it does not."""
    optim = config.optim
    differs = optim.body_lr_factor != 1 or optim.layer_decay != 1 or optim.agc is not None
    return find_heads(config.model) if differs else ()


def _sgd(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    for parameter in (p for group in groups for p in group["params"] if config.momentum):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)  # a first step may be left out
    return optimizer


def _adamw(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def _lamb(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    return LAMB(groups, 0.0, config.betas, config.eps, config.adapt_all)


def _lars(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    return LARS(groups, 0.0, config.momentum, config.trust_coefficient, config.adapt_all)


#: One entry for each of `OPTIMIZER_NAMES`: builds the optimizer from parameter groups, with a rate of 0.
OPTIMIZERS: dict[str, Callable[[list[dict], OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lamb": _lamb,
    "lars": _lars,
}


def make_optimizer(model: nn.Module, config: OptimConfig, heads: tuple[str, ...] = ()) -> torch.optim.Optimizer:
    """The configured optimizer; its learning rate is set at every step by the schedule.

    torch's are fused, since only then an update can be left out on the device's own judgement (`TrainStep`). Raises
    UserError where one of the user's own can't be made.
    """
    groups = parameter_groups(model, config, heads)
    return make_own_optimizer(groups, config) if is_own(config.name) else OPTIMIZERS[config.name](groups, config)


def values_per_parameter(config: OptimConfig) -> int:
    """Values that the optimizer keeps for each trained parameter, counted after a step of a small layer."""
    layer = nn.Linear(2, 3, bias=False)
    optimizer = make_optimizer(layer, config)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    kept = optimizer.state[layer.weight].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == layer.weight.shape for value in kept)
