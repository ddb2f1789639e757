"""The group `optim`: how the weights are changed, and the loss."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.fields import Check, at_least_zero, positive
from pipeline.config.networks import is_own

OPTIMIZER_NAMES = ("sgd", "adamw", "lamb", "lars")
LOSS_NAMES = ("ce", "bce")


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are changed, and the loss."""

    name: str = "sgd"
    """sgd, adamw, lamb or lars; or `MODULE:CLASS`, an optimizer of your own or of torch (`torch.optim:NAdam`). adamw:
    with weight_decay 0 it is Adam; lamb: You et al. 2020 (arXiv 1904.00962); lars: You et al. 2017 (arXiv
    1708.03888)."""
    kwargs: dict = field(default_factory=dict, hash=False)  # not dict[str, Any]: there "5" would become 5
    """Further arguments of an optimizer of your own: {"betas": [0.9, 0.99]}. momentum, betas, eps and the like below
    are for ours."""
    lr: float = 0.1
    """Peak learning rate; see lr_batch_size."""
    lr_batch_size: int | None = 256
    """The global batch that `lr` is meant for: the rate is scaled to train.global_batch_size. None: `lr` is used as it
    stands."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """How the rate follows the batch: linear (Goyal et al. 2017), or its square root (You et al. 2020, for LAMB)."""
    momentum: float = 0.9
    """sgd and lars only."""
    nesterov: bool = False
    """sgd only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of adamw and lamb."""
    eps: float = 1e-8
    """Denominator term of adamw and lamb."""
    trust_coefficient: float = 0.001
    """lars: how far a layer may go in a step, as a share of its weights' norm (eta in the paper)."""
    adapt_all: bool = False
    """lamb, lars: give the layer-wise rate to tensors without weight decay too; default: they take the plain step, as
    in timm and apex."""
    weight_decay: float = 1e-4
    """Weight decay of the weights; see norm_weight_decay and bias_weight_decay for normalization layers and biases."""
    norm_weight_decay: float = 0.0
    """Weight decay of normalization layers and, unless bias_weight_decay is given, of biases."""
    bias_weight_decay: float | None = None
    """Weight decay of the biases of all other layers; default: as norm_weight_decay."""
    clip_norm: float | None = None
    """Scale the gradient down to this norm over all parameters (Pascanu et al. 2013; LAMB in timm and apex: 1)."""
    agc: float | None = None
    """Scale each unit's gradient down to this share of the norm of its weights (adaptive clipping, Brock et al. 2021);
    the head is left out."""
    body_lr_factor: float = 1.0
    """Factor of the learning rate for all but the head."""
    layer_decay: float = 1.0
    """Factor of the learning rate from one layer or block to the one before it, for transfer (Clark et al. 2020): 1 for
    the head, smallest for the first layer."""
    loss: str = "ce"
    """ce: cross-entropy; bce: binary cross-entropy of each class by itself, its mean over classes and batch (Wightman
    et al. 2021); or `MODULE:FUNCTION`, a function of your own that takes (logits, targets)."""
    bce_threshold: float | None = None
    """bce: targets above this count as 1, all others as 0; default: as they are."""
    l1: float = 0.0
    """Adds l1 * sum |w| over all trained parameters to the loss."""
    l2: float = 0.0
    """Adds l2 / 2 * sum w^2 over all trained parameters to the loss."""
    label_smoothing: float = 0.0
    """Probability that the target distribution spreads evenly over all classes (Szegedy et al. 2016)."""


def _choices(names: tuple[str, ...], own: str) -> str:
    return f"give one of {', '.join(map(repr, names))}, or {own} for your own"


def check_optim(c: OptimConfig) -> Iterator[Check]:
    """Impossible values of the group `optim`."""
    yield "optim.name", c.name, c.name in OPTIMIZER_NAMES or is_own(c.name), _choices(OPTIMIZER_NAMES, "MODULE:CLASS")
    yield "optim.kwargs", c.kwargs, not c.kwargs or is_own(c.name), "it is for an optimizer of your own; leave it out"
    yield "optim.loss", c.loss, c.loss in LOSS_NAMES or is_own(c.loss), _choices(LOSS_NAMES, "MODULE:FUNCTION")
    yield positive("optim.lr", c.lr)
    yield positive("optim.lr_batch_size", c.lr_batch_size, optional=True)
    yield "optim.momentum", c.momentum, 0 <= c.momentum < 1, "give a number from 0 to below 1"
    nesterov = not c.nesterov or (c.momentum > 0 and c.name == "sgd")
    yield (
        "optim.nesterov",
        c.nesterov,
        nesterov,
        "it is for sgd with optim.momentum above 0; give --optim.nesterov false",
    )
    yield (
        "optim.betas",
        list(c.betas),
        all(0 <= b < 1 for b in c.betas),
        "give two numbers from 0 to below 1",
    )
    yield positive("optim.eps", c.eps)
    yield at_least_zero("optim.weight_decay", c.weight_decay)
    yield at_least_zero("optim.norm_weight_decay", c.norm_weight_decay)
    yield at_least_zero("optim.bias_weight_decay", c.bias_weight_decay or 0)
    yield positive("optim.trust_coefficient", c.trust_coefficient)
    yield positive("optim.clip_norm", c.clip_norm, optional=True)
    yield positive("optim.agc", c.agc, optional=True)
    yield positive("optim.body_lr_factor", c.body_lr_factor)
    yield "optim.layer_decay", c.layer_decay, 0 < c.layer_decay <= 1, "give a number above 0, at most 1"
    threshold = c.bce_threshold
    yield "optim.bce_threshold", threshold, threshold is None or 0 <= threshold < 1, "give a number from 0 to below 1"
    unused = threshold is not None and c.loss != "bce"
    yield "optim.bce_threshold", threshold, not unused, "it is for --optim.loss bce; leave it out"
    yield at_least_zero("optim.l1", c.l1)
    yield at_least_zero("optim.l2", c.l2)
    smoothing = c.label_smoothing
    yield "optim.label_smoothing", smoothing, 0 <= smoothing < 1, "give a number from 0 to below 1"
    unused = smoothing > 0 and is_own(c.loss)
    yield "optim.label_smoothing", smoothing, not unused, "it is for ce and bce; a loss of your own smooths by itself"
