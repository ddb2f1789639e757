"""The loss of a batch."""

from torch import nn

from pipeline.config import OptimConfig


def make_loss(config: OptimConfig) -> nn.Module:
    """Cross-entropy of logits [B, K] against labels int64 [B], mean over the batch; label smoothing as in
    Szegedy et al. 2016, section 7."""
    return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
