"""LAMB and LARS: optimizers whose rate is adapted layer by layer, in foreach form.

Both leave an update out on the device's own judgement, as torch's fused optimizers do: where `found_inf` (float, 0 or
1) is set on the optimizer and is 1, weights and state stay as they were, and nobody waits to find out.
"""

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.errors import TransientError

Tensors = list[torch.Tensor]


class _Layerwise(torch.optim.Optimizer):
    """What both have in common: gradients that are numbers, the trust ratio, and the switch."""

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients. A closure is not taken."""
        if closure is not None:
            raise TransientError(f"{type(self).__name__} takes no closure")
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                found = torch.zeros((), device=weights[0].device) if self.found_inf is None else self.found_inf
                good = 1 - found.to(weights[0].device)
                clean = [torch.where(good > 0, p.grad, 0) for p in weights]  # NaN times 0 would be NaN
                self._update(group, weights, clean, good)

    def _update(self, group: dict, weights: Tensors, gradients: Tensors, good: torch.Tensor) -> None:
        raise NotImplementedError

    def _states(self, weights: Tensors, name: str) -> Tensors:
        """State `name` of these weights; zeros at first."""
        for p in weights:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [self.state[p][name] for p in weights]


def _scale(tensors: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
    """Multiply each tensor by its factor, in place; factors: [n]."""
    torch._foreach_mul_(list(tensors), list(factors.unbind()))


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of each tensor, [n]."""
    return torch.stack(torch._foreach_norm(list(tensors)))


class LAMB(_Layerwise):
    """You et al. 2020 (arXiv 1904.00962), algorithm 2 with bias correction:

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, r = m' / (sqrt(v') + eps), x -= lr |x| / |r + wd x| (r + wd x)

    Where |x| or |r + wd x| is 0, that quotient is 1; also for tensors without weight decay unless `adapt_all`. The
    scaling of the whole gradient to a norm of 1 that timm and apex do first is `optim.clip_norm`.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, adapt_all: bool = False):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "adapt_all": adapt_all}
        super().__init__(params, {**defaults, "capturable": True})  # so that loading puts `step` on the device

    def _update(self, group: dict, weights: Tensors, gradients: Tensors, good: torch.Tensor) -> None:
        (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        first, second = self._states(weights, "exp_avg"), self._states(weights, "exp_avg_sq")
        for p in weights:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
        steps = [self.state[p]["step"] for p in weights]
        torch._foreach_add_(steps, good, alpha=1)  # without alpha torch reads `good` as a number, and waits for it
        torch._foreach_mul_(first, 1 - (1 - b1) * good)
        torch._foreach_add_(first, gradients, alpha=1 - b1)
        torch._foreach_mul_(second, 1 - (1 - b2) * good)
        torch._foreach_addcmul_(second, gradients, gradients, value=1 - b2)
        done = steps[0].clamp(min=1)
        below = torch._foreach_sqrt(second)
        torch._foreach_div_(below, (1 - b2**done).sqrt())
        torch._foreach_add_(below, group["eps"])
        update = torch._foreach_div(first, below)
        torch._foreach_div_(update, 1 - b1**done)
        if decay:
            torch._foreach_add_(update, weights, alpha=decay)
        if decay or group["adapt_all"]:
            size, change = _norms(weights), _norms(update)
            ratio = torch.where((size > 0) & (change > 0), size / change, 1.0)
            _scale(update, ratio)
        torch._foreach_mul_(update, good * lr)
        torch._foreach_sub_(weights, update)


class LARS(_Layerwise):
    """You et al. 2017 (arXiv 1708.03888), algorithm 1:

    local = eta |w| / (|g| + wd |w|), v = momentum v + lr local (g + wd w), w -= v

    Where |w| or |g| is 0, `local` is 1; also for tensors without weight decay unless `adapt_all`.
    """

    def __init__(self, params: Any, lr: float, momentum: float, trust_coefficient: float, adapt_all: bool = False):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "adapt_all": adapt_all}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    def _update(self, group: dict, weights: Tensors, gradients: Tensors, good: torch.Tensor) -> None:
        decay, velocity = group["weight_decay"], self._states(weights, "momentum_buffer")
        adapts = decay or group["adapt_all"]
        if adapts:
            size, slope = _norms(weights), _norms(gradients)
            known = (size > 0) & (slope > 0)
            local = torch.where(known, group["trust_coefficient"] * size / (slope + decay * size), 1.0)
        change = torch._foreach_add(gradients, weights, alpha=decay)
        if adapts:
            _scale(change, local)
        torch._foreach_mul_(change, good * group["lr"])
        torch._foreach_mul_(velocity, 1 - (1 - group["momentum"]) * good)
        torch._foreach_add_(velocity, change)
        torch._foreach_sub_(weights, torch._foreach_mul(velocity, good))
