"""What was drawn for a local batch, brought to the step's device: grouped by op, so nothing has to be read back."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from pipeline.augment.params import AugmentParams, Mixing
from pipeline.augment.policies import CODE, OPS, inverse_affine

GEOMETRIC = frozenset(("shear_x", "shear_y", "translate_x", "translate_y", "rotate"))


def deliver(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; to a GPU without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Group(NamedTuple):
    """One change for some images of the batch. op: its name (all geometric ones: "affine"). rows: int64 [n], which
    images. amounts: float32 [n], or [n, 2, 3] for "affine": where, in pixels from the middle, a pixel comes from."""

    op: str
    rows: torch.Tensor
    amounts: torch.Tensor


@dataclass(frozen=True)
class PixelOps:
    """The changes of a batch's images, one list of groups after another; no image is in two groups of a list."""

    rounds: list[list[Group]]

    @classmethod
    def of(cls, drawn: AugmentParams | None, size: int, device: torch.device) -> "PixelOps | None":
        """Of images of `size` x `size` pixels."""
        if drawn is None or drawn.ops is None:
            return None
        return cls([_groups(*column, size, device) for column in zip(drawn.ops.T, drawn.amounts.T, strict=True)])


def _groups(ops: np.ndarray, amounts: np.ndarray, size: int, device: torch.device) -> list[Group]:
    """One change of each image (ops uint8 [B], amounts float32 [B]), grouped. Two transfers, whatever there is."""
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
    rows = deliver(np.concatenate([rows for rows, _ in parts.values()]), device)
    values = deliver(np.concatenate([values.ravel() for _, values in parts.values()]), device)
    groups, row, value = [], 0, 0
    for name, (some, numbers) in parts.items():
        here = values[value : value + numbers.size].view(numbers.shape)
        groups.append(Group(name, rows[row : row + len(some)], here))
        row, value = row + len(some), value + numbers.size
    return groups


class EraseAndMix(NamedTuple):
    """What is done to normalized images, sample by sample. erased: int32 [B, 4], or None. blends: float32 [B], boxes:
    int32 [B, 4], shares: float32 [B], as in `draws.Mixing`, or all None."""

    erased: torch.Tensor | None
    blends: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    shares: torch.Tensor | None = None

    @classmethod
    def of(cls, drawn: AugmentParams | None, mixing: Mixing | None, device: torch.device) -> "EraseAndMix | None":
        erased = None if drawn is None else drawn.erased
        if erased is None and mixing is None:
            return None
        arrays = (erased, *((None,) * 3 if mixing is None else (mixing.blends, mixing.boxes, mixing.shares)))
        return cls(*(None if array is None else deliver(array, device) for array in arrays))

    def split(self, size: int) -> "list[EraseAndMix]":
        """In pieces of `size` samples, as torch's split."""
        count = len(next(part for part in self if part is not None))
        pieces = range(0, count, size)
        return [EraseAndMix(*(None if part is None else part[i : i + size] for part in self)) for i in pieces]
