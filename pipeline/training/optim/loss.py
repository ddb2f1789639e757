"""The loss of a batch: of all heads against labels or soft targets, and penalties on the weights."""

import torch
from torch import nn
from torch.nn import functional

from pipeline.config import Config
from pipeline.config.networks import is_own
from pipeline.model.build import auxiliary_weight
from pipeline.training.optim.own import load_loss


class ClassLoss(nn.Module):
    """The loss of logits [B, K] against labels int64 [B] or soft targets float [B, K], mean over the batch.

    Label smoothing as in Szegedy et al. 2016, section 7: a share of the target is spread over all classes, in soft
    targets too. `kind` "ce": cross-entropy. "bce": binary cross-entropy of each class by itself, mean over classes too
    (Wightman et al. 2021); with a `threshold`, targets above it count as 1 and all others as 0.
    """

    def __init__(self, kind: str, smoothing: float, threshold: float | None = None):
        super().__init__()
        self.kind, self.smoothing, self.threshold = kind, smoothing, threshold

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.kind == "bce" or targets.is_floating_point():
            logits = logits.float()  # autocast gives 16 bits, in which soft targets are not
        if self.kind == "ce":
            return functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        classes = logits.shape[1]
        if not targets.is_floating_point():
            targets = functional.one_hot(targets, classes)
        targets = targets.to(logits.dtype) * (1 - self.smoothing) + self.smoothing / classes
        if self.threshold is not None:
            targets = (targets > self.threshold).to(logits.dtype)
        return functional.binary_cross_entropy_with_logits(logits, targets)


class OwnLoss(nn.Module):
    """A loss of the user's own, on logits float32 [B, K] whatever autocast made of them."""

    def __init__(self, name: str):
        super().__init__()
        self.function = load_loss(name)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.function(logits.float(), targets)


class Loss(nn.Module):
    """`ClassLoss` (or `OwnLoss`) of all heads, and penalties on the weights.

    Takes logits [B, K], or a tuple of the logits and the auxiliary heads', whose losses count `auxiliary` times. Adds
    l1 * sum |w| + l2 / 2 * sum w^2 over the trained parameters.
    """

    def __init__(self, of_classes: nn.Module, auxiliary: float, l1: float, l2: float, parameters: list[nn.Parameter]):
        super().__init__()
        self.of_classes = of_classes
        self.auxiliary, self.l1, self.l2 = auxiliary, l1, l2
        self.penalised = tuple(parameters)  # a tuple: they are the model's, not this module's

    def forward(self, output: torch.Tensor | tuple, targets: torch.Tensor) -> torch.Tensor:
        logits, *others = output if isinstance(output, tuple) else (output,)
        loss = self.of_classes(logits, targets)
        for other in others:
            loss = loss + self.auxiliary * self.of_classes(other, targets)
        if self.l1:
            loss = loss + self.l1 * sum(p.abs().sum() for p in self.penalised)
        if self.l2:
            loss = loss + self.l2 / 2 * sum(p.square().sum() for p in self.penalised)
        return loss


def make_loss(config: Config, model: nn.Module) -> Loss:
    """The configured loss of a model's training."""
    optim, trained = config.optim, [p for p in model.parameters() if p.requires_grad]
    of_classes: nn.Module
    if is_own(optim.loss):
        of_classes = OwnLoss(optim.loss)
    else:
        of_classes = ClassLoss(optim.loss, optim.label_smoothing, optim.bce_threshold)
    return Loss(of_classes, auxiliary_weight(config.model), optim.l1, optim.l2, trained)
