"""Erasing, mixup and CutMix: of normalized images, on the device, inside what is compiled.

Images are mixed within groups of consecutive ones, each with the one before it (the first with the last): as
torchvision's MixUp and CutMix do in a batch. No rank and no micro batch splits a group.
"""

import torch
from torch.nn.functional import one_hot

from pipeline.augment.apply import EraseAndMix
from pipeline.config import AugmentConfig


def partners(values: torch.Tensor, group: int) -> torch.Tensor:
    """[B, ...] -> [B, ...]: for each sample the one before it in its group of `group`."""
    return values.unflatten(0, (-1, group)).roll(1, 1).flatten(0, 1)


def inside(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """bool [B, 1, H, W]: does the pixel lie in the sample's box (int32 [B, 4]: left, top, width, height)?"""
    left, top, wide, high = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    x = torch.arange(width, device=boxes.device)
    y = torch.arange(height, device=boxes.device)[:, None]
    return (x >= left) & (x < left + wide) & (y >= top) & (y < top + high)


def apply_erase_mix(pixels: torch.Tensor, how: EraseAndMix, group: int) -> torch.Tensor:
    """Erase, then mix. pixels: float [B, 3, H, W], normalized: what is erased becomes 0, the mean color."""
    size = pixels.shape[-2:]
    if how.erased is not None:
        pixels = torch.where(inside(how.erased, *size), 0.0, pixels)
    if how.boxes is not None and how.blends is not None:
        others = partners(pixels, group)
        blended = torch.lerp(others, pixels, how.blends.view(-1, 1, 1, 1))
        pixels = torch.where(inside(how.boxes, *size), others, blended)
    return pixels


def soft_targets(targets: torch.Tensor, shares: torch.Tensor, group: int, classes: int) -> torch.Tensor:
    """float32 [B, classes]: each label (int64 [B]) counts its share, its partner's the rest."""
    hard = one_hot(targets, classes).float()
    share = shares[:, None]
    return hard * share + partners(hard, group) * (1 - share)


def neutral_erase_mix(c: AugmentConfig, count: int, device: torch.device) -> EraseAndMix | None:
    """Parameters that erase and mix nothing, shaped as a step of this configuration gets them."""
    if not c.mixes and c.random_erase == 0:
        return None

    def nowhere() -> torch.Tensor:
        return torch.zeros(count, 4, dtype=torch.int32, device=device)

    def whole() -> torch.Tensor:
        return torch.ones(count, dtype=torch.float32, device=device)

    mixing = (whole(), nowhere(), whole()) if c.mixes else (None, None, None)  # no tensor twice: compiled code asks
    return EraseAndMix(nowhere() if c.random_erase > 0 else None, *mixing)
