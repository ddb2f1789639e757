"""Losses against hard and soft targets, by the formula."""

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid

from pipeline.training.optim.loss import ClassLoss

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.1, 0.2, -3.0, 1.0]])
LABELS = torch.tensor([0, 3])
ONE_HOT = torch.eye(4)[LABELS]
MIXED = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 0.1, 0.0, 0.9]])


def binary(targets: torch.Tensor) -> torch.Tensor:
    return -(targets * logsigmoid(LOGITS) + (1 - targets) * logsigmoid(-LOGITS)).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    loss = ClassLoss("ce", smoothing)
    smooth = MIXED * (1 - smoothing) + smoothing / 4
    torch.testing.assert_close(loss(LOGITS, MIXED), -(smooth * log_softmax(LOGITS, 1)).sum(1).mean())
    torch.testing.assert_close(loss(LOGITS, LABELS), cross_entropy(LOGITS, LABELS, label_smoothing=smoothing))
    torch.testing.assert_close(loss(LOGITS, ONE_HOT), loss(LOGITS, LABELS))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy(smoothing):
    loss = ClassLoss("bce", smoothing)
    torch.testing.assert_close(loss(LOGITS, MIXED), binary(MIXED * (1 - smoothing) + smoothing / 4))
    torch.testing.assert_close(loss(LOGITS, LABELS), binary(ONE_HOT * (1 - smoothing) + smoothing / 4))


def test_targets_above_the_threshold_are_present():
    loss = ClassLoss("bce", 0.1, threshold=0.2)
    torch.testing.assert_close(loss(LOGITS, MIXED), binary((MIXED > 0.2).float()))
    torch.testing.assert_close(loss(LOGITS, LABELS), binary(ONE_HOT))


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_sixteen_bits_from_autocast_are_enough(kind):
    loss = ClassLoss(kind, 0.1)(LOGITS.bfloat16(), MIXED)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ClassLoss(kind, 0.1)(LOGITS, MIXED), rtol=1e-2, atol=1e-2)
