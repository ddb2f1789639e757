"""The loss of a batch: cross-entropy of all heads, and penalties on the weights."""

import torch
from torch import nn

from pipeline.config import Config
from pipeline.model.build import auxiliary_weight


class Loss(nn.Module):
    """Cross-entropy against labels int64 [B], mean over the batch; label smoothing as in Szegedy et al. 2016, section
    7.

    Takes logits [B, K], or a tuple of the logits and the auxiliary heads', whose losses count `auxiliary` times. Adds
    l1 * sum |w| + l2 / 2 * sum w^2 over the trained parameters.
    """

    def __init__(self, smoothing: float, auxiliary: float, l1: float, l2: float, parameters: list[nn.Parameter]):
        super().__init__()
        self.entropy = nn.CrossEntropyLoss(label_smoothing=smoothing)
        self.auxiliary, self.l1, self.l2 = auxiliary, l1, l2
        self.penalised = tuple(parameters)  # a tuple: they are the model's, not this module's

    def forward(self, output: torch.Tensor | tuple, targets: torch.Tensor) -> torch.Tensor:
        logits, *others = output if isinstance(output, tuple) else (output,)
        loss = self.entropy(logits, targets)
        for other in others:
            loss = loss + self.auxiliary * self.entropy(other, targets)
        if self.l1:
            loss = loss + self.l1 * sum(p.abs().sum() for p in self.penalised)
        if self.l2:
            loss = loss + self.l2 / 2 * sum(p.square().sum() for p in self.penalised)
        return loss


def make_loss(config: Config, model: nn.Module) -> Loss:
    """The configured loss of a model's training."""
    optim, trained = config.optim, [p for p in model.parameters() if p.requires_grad]
    return Loss(optim.label_smoothing, auxiliary_weight(config.model), optim.l1, optim.l2, trained)
