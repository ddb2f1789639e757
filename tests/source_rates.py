"""Learning rates as the sources of the recipes compute them; also drawn by scripts/make_recipes_page.py."""

import math
from collections.abc import Callable

import numpy as np

IMAGES = 1_281_167  #: of ImageNet's training set

Formula = Callable[[float, int], float]  # (time in epochs at the beginning of a step, its epoch) -> learning rate


def _cosine(left: float) -> float:
    """From 1 to 0 while the share of the run that is over goes from 0 to 1."""
    return (1 + math.cos(math.pi * left)) / 2


def _torchvision_v2(now: float, epoch: int) -> float:
    """references/classification/train.py: LinearLR(start_factor 0.01, 5 epochs), then CosineAnnealingLR(595), both
    stepped once an epoch."""
    return 0.5 * (0.01 + 0.99 * epoch / 5) if epoch < 5 else 0.5 * _cosine((epoch - 5) / 595)


def _timm(epochs: int, peak: float) -> Formula:
    """timm.scheduler.CosineLRScheduler(warmup_t=5, warmup_lr_init=1e-4, lr_min=1e-6), stepped once an epoch."""
    return lambda now, epoch: (
        1e-4 + epoch * (peak - 1e-4) / 5 if epoch < 5 else 1e-6 + (peak - 1e-6) * _cosine(epoch / epochs)
    )


def _goyal(now: float, epoch: int) -> float:
    """Section 2.2: from 0.1 to 3.2 by a constant amount an iteration over 5 epochs; section 5.1: / 10 at 30, 60, 80."""
    return 0.1 + 3.1 * now / 5 if now < 5 else 3.2 / 10 ** sum(now >= border for border in (30, 60, 80))


def _ffcv(epochs: int) -> Formula:
    """ffcv-imagenet train_imagenet.py get_lr: np.interp over the epochs, and within an epoch over its iterations."""
    return lambda now, epoch: float(np.interp(now, [0, 2, epochs], [1.7e-4, 1.7, 0]))


def _dle(now: float, epoch: int) -> float:
    """DeepLearningExamples ConvNets, lr_cosine_policy(2.048, 8, 90), once an epoch: the warm-up has (epoch + 1) / 8."""
    return 2.048 * (epoch + 1) / 8 if epoch < 8 else 2.048 * _cosine((epoch - 8) / 82)


#: recipe -> its source's learning rate (of resnet152-a1h, A1's, which it is based on)
RATES: dict[str, Formula] = {
    "resnet152-he2015": lambda now, epoch: 0.1 / 10 ** int(now * IMAGES / 256 / 150_000 + 1e-9),
    "resnet152-torchvision-v1": lambda now, epoch: 0.1 / 10 ** (epoch // 30),
    "resnet152-torchvision-v2": _torchvision_v2,
    "resnet152-goyal": _goyal,
    "resnet152-a1": _timm(600, 5e-3),
    "resnet152-a1h": _timm(600, 5e-3),
    "resnet152-a2": _timm(300, 5e-3),
    "resnet152-a3": _timm(100, 8e-3),
    "resnet50-ffcv-16": _ffcv(16),
    "resnet50-ffcv-88": _ffcv(88),
    "resnet50-dle-90": _dle,
}
