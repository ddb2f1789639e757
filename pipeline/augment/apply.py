"""The augmentations of a local batch, brought to the step's device: grouped by op, so nothing is read back."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pipeline.augment.params import AugmentParams, Mixing
from pipeline.augment.policies import CODE, OPS, inverse_affine

GEOMETRIC = frozenset(("shear_x", "shear_y", "translate_x", "translate_y", "rotate"))


def deliver(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; copied to a GPU asynchronously."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Group(NamedTuple):
    """One op for some images of the batch. op: its name (all geometric ones: "affine"). rows: int64 [n], indices of the
    images. amounts: float32 [n], or [n, 2, 3] for "affine": the source of each pixel, in pixels from the center."""

    op: str
    rows: torch.Tensor
    amounts: torch.Tensor


@dataclass(frozen=True)
class PixelOps:
    """The ops of a batch, one list of groups after another; no image is in two groups of a list. shifts: int64 [B, 2],
    pixels to the right and down by which the images are moved first; None: they stay."""

    rounds: list[list[Group]]
    shifts: torch.Tensor | None = None

    @classmethod
    def of(cls, augment_params: AugmentParams | None, size: int, device: torch.device) -> "PixelOps | None":
        """Of images of `size` x `size` pixels."""
        if augment_params is None:
            return None
        ops, amounts, shifts = augment_params.ops, augment_params.amounts, augment_params.shifts
        moved = None if shifts is None else deliver(shifts.astype(np.int64), device)
        if ops is None or amounts is None:
            return None if moved is None else cls([], moved)
        return cls([_groups(*column, size, device) for column in zip(ops.T, amounts.T, strict=True)], moved)


def _groups(ops: np.ndarray, amounts: np.ndarray, size: int, device: torch.device) -> list[Group]:
    """One op of each image (ops uint8 [B], amounts float32 [B]), grouped. Always two transfers to the device."""
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    affine_rows, matrices = [], []
    for code in np.unique(ops):
        name, rows = OPS[code], np.flatnonzero(ops == code)
        if name in GEOMETRIC:
            affine_rows.append(rows)
            matrices.append(inverse_affine(name, amounts[rows], size))
        elif code != CODE["identity"]:
            parts[name] = rows, amounts[rows]
    if affine_rows:
        parts["affine"] = np.concatenate(affine_rows), np.concatenate(matrices)
    if not parts:
        return []
    all_rows = deliver(np.concatenate([rows for rows, _ in parts.values()]), device)
    all_amounts = deliver(np.concatenate([values.ravel() for _, values in parts.values()]), device)
    groups, row, value = [], 0, 0
    for name, (numbers, amounts) in parts.items():
        here = all_amounts[value : value + amounts.size].view(amounts.shape)
        groups.append(Group(name, all_rows[row : row + len(numbers)], here))
        row, value = row + len(numbers), value + amounts.size
    return groups


class EraseAndMix(NamedTuple):
    """Erasing and mixing of normalized images, by sample. erased: int32 [B, 4], or None. blends: float32 [B], boxes:
    int32 [B, 4], shares: float32 [B], as in `params.Mixing`, or all None."""

    erased: torch.Tensor | None
    blends: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    @classmethod
    def of(
        cls, augment_params: AugmentParams | None, mixing: Mixing | None, device: torch.device
    ) -> "EraseAndMix | None":
        erased = None if augment_params is None else augment_params.erased
        if erased is None and mixing is None:
            return None
        arrays = (erased, *((None,) * 3 if mixing is None else (mixing.blends, mixing.boxes, mixing.shares)))
        return cls(*(None if array is None else deliver(array, device) for array in arrays))

    def split(self, size: int) -> "list[EraseAndMix]":
        """Pieces of `size` samples, as torch's split."""
        count = len(next(part for part in self if part is not None))
        pieces = range(0, count, size)
        return [EraseAndMix(*(None if part is None else part[i : i + size] for part in self)) for i in pieces]
