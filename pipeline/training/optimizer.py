"""The optimizer, with weight decay by module type."""

from collections.abc import Iterator

import torch
from torch import nn

from pipeline.config import OptimConfig

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)


def _parameters_by_kind(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Each trainable parameter once, and whether it is a norm's or a bias."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield parameter, isinstance(module, _NORMS) or name == "bias"


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Two groups: weights with `weight_decay`; norms and biases, found by module type, with `norm_weight_decay`."""
    kinds = list(_parameters_by_kind(model))
    weights = [parameter for parameter, is_norm in kinds if not is_norm]
    norms = [parameter for parameter, is_norm in kinds if is_norm]
    groups = [(weights, config.weight_decay), (norms, config.norm_weight_decay)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def make_optimizer(model: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """The configured optimizer; its learning rate is set anew at every step by the schedule."""
    groups = parameter_groups(model, config)
    fused = device.type == "cuda"
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=fused)
