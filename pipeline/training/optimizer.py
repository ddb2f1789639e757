"""The optimizer, with weight decay by module type."""

from collections.abc import Iterator

import torch
from torch import nn

from pipeline.config import OptimConfig
from pipeline.model.heads import NORMS, in_heads


def _parameters_by_kind(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Each trainable parameter once, with its name, and whether it is a norm's or a bias."""
    seen = set()
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{place}.{name}", parameter, isinstance(module, NORMS) or name == "bias"


def parameter_groups(model: nn.Module, config: OptimConfig, heads: tuple[str, ...] = ()) -> list[dict]:
    """Weights with `weight_decay`; norms and biases, found by module type, with `norm_weight_decay`.

    With a `body_lr` other than 1, two such groups for all but the `heads` (names of modules), and two for these.
    `lr_factor`: what the schedule's rate is multiplied by.
    """
    kinds = [(p, is_norm, in_heads(name, heads)) for name, p, is_norm in _parameters_by_kind(model)]
    groups = []
    for in_head in (False, True) if config.body_lr != 1 else (None,):
        for norms, decay in ((False, config.weight_decay), (True, config.norm_weight_decay)):
            chosen = [p for p, is_norm, head in kinds if is_norm == norms and in_head in (None, head)]
            factor = config.body_lr if in_head is False else 1.0
            groups.append({"params": chosen, "weight_decay": decay, "lr_factor": factor})
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: OptimConfig, heads: tuple[str, ...] = ()) -> torch.optim.Optimizer:
    """The configured optimizer; its learning rate is set anew at every step by the schedule.

    Fused, since only then an update can be left out on the device's own judgement (`TrainStep`).
    """
    groups = parameter_groups(model, config, heads)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    for parameter in (p for group in groups for p in group["params"] if config.momentum):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)  # a first step may be left out
    return optimizer
