"""Gradient clipping: by the norm of all gradients together, and unit by unit."""

import torch
from torch import nn

_LEAST_NORM = 1e-3  # of a unit's weights, so that those at zero can move (Brock et al. 2021, section 4.1)


def clip_norm(parameters: list[nn.Parameter], largest: float) -> None:
    """Scale all gradients by one factor so that their norm is `largest` at most."""
    nn.utils.clip_grad_norm_(parameters, largest, foreach=parameters[0].device.type == "cuda")


def unit_norms(values: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of each unit's part, broadcastable to `values`: of a row, a filter, or the whole of a vector."""
    dims = tuple(range(1, values.ndim)) or None
    return torch.linalg.vector_norm(values, dim=dims, keepdim=dims is not None)


@torch.no_grad()
def adaptive_gradient_clip(parameters: list[nn.Parameter], share: float) -> None:
    """Scale each unit's gradient so that its norm is at most `share` times that of the unit's weights (Brock et al.
    2021, equation 3)."""
    for p in parameters:
        assert p.grad is not None
        largest = share * unit_norms(p).clamp(min=_LEAST_NORM)
        p.grad.mul_((largest / unit_norms(p.grad).clamp(min=1e-6)).clamp(max=1.0))
