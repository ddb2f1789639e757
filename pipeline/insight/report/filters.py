"""A network's convolutions as pictures: the first layer's kernels in color, one kernel of the second as gray tiles."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

COLUMNS = 8  # of the grid
TILE = 49  # pixels of a kernel's side on the picture, about
MOST = 96  # tiles of a picture: a vision transformer has 768 patches of 32 x 32


@dataclass(frozen=True)
class Kernels:
    """Weights of a layer, float [n, c, h, w], where it is in the network."""

    name: str
    weights: np.ndarray


def convolutions(model: nn.Module) -> list[Kernels]:
    """The first two convolutions with kernels larger than one pixel, in the order of the network; or what there is."""
    found = [
        (name, m.weight) for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1
    ]
    return [Kernels(name, weight.detach().float().cpu().numpy()) for name, weight in found[:2]]


def grid(tiles: np.ndarray, columns: int, scale: int) -> np.ndarray:
    """uint8 [n, h, w, 3] as one picture, each pixel `scale` wide, with lines of one pixel between (mid-gray)."""
    n, h, w, _ = tiles.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h * scale + 1) + 1, columns * (w * scale + 1) + 1, 3), 128, np.uint8)
    for number, tile in enumerate(tiles):
        top = 1 + number // columns * (h * scale + 1)
        left = 1 + number % columns * (w * scale + 1)
        canvas[top : top + h * scale, left : left + w * scale] = tile.repeat(scale, 0).repeat(scale, 1)
    return canvas


def _to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(255 * (values - low) / ((high - low) or 1), 0, 255).astype(np.uint8)


def picture_first(kernels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Each kernel of [n, c, h, w] as a tile, in color where c is 3, otherwise the mean over its channels in gray."""
    tiles = kernels.transpose(0, 2, 3, 1)
    if tiles.shape[-1] != 3:
        tiles = tiles.mean(-1, keepdims=True).repeat(3, -1)
    return grid(_to_bytes(tiles, low, high), COLUMNS, max(2, TILE // tiles.shape[1]))


def picture_second(kernel: np.ndarray, low: float, high: float) -> np.ndarray:
    """The channels of one kernel [c, h, w] as gray tiles."""
    tiles = kernel[..., None].repeat(3, -1)
    return grid(_to_bytes(tiles, low, high), COLUMNS, max(2, TILE // tiles.shape[1]))


def before_after(before: nn.Module, after: nn.Module) -> list[tuple[str, dict[str, np.ndarray]]]:
    """[(caption, {"before", "after", "difference": picture uint8 [h, w, 3]})] of the first and second convolution.

    Before and after share a scale; the difference has its own, with gray for no change.
    """
    shown = []
    for number, (old, new) in enumerate(zip(convolutions(before), convolutions(after), strict=True)):
        a, b = (old.weights, new.weights) if number == 0 else (old.weights[0], new.weights[0])
        count, a, b = len(a), a[:MOST], b[:MOST]
        draw = picture_first if number == 0 else picture_second
        low, high = float(min(a.min(), b.min())), float(max(a.max(), b.max()))
        most = float(np.abs(b - a).max()) or 1.0
        pictures = {"before": draw(a, low, high), "after": draw(b, low, high), "difference": draw(b - a, -most, most)}
        what = f"{count} kernels" if number == 0 else f"the {count} channels of its first kernel"
        if count > MOST:
            what += f", the first {MOST} shown"
        size = "x".join(map(str, old.weights.shape[2:]))
        shown.append((f"{old.name}: {what}, {size}; largest change {most:.3g}", pictures))
    return shown


def grad_cam(network: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> np.ndarray | None:
    """Where the network looks (Selvaraju et al. 2017): float [B, h, w], 0 to 1, for each image and its target class.

    images: uint8 [B, H, W, 3]. Taken at the last feature map [B, C, h, w] of more than one pixel. None for a network
    with attention, whose feature maps are laid out otherwise.
    """
    if any("attention" in type(module).__name__.lower() for module in network.modules()):
        return None
    maps: list[torch.Tensor] = []

    def record_map(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        if (
            isinstance(output, torch.Tensor)
            and output.dim() == 4
            and min(output.shape[2:]) > 1
            and output.requires_grad
        ):
            maps.append(output)

    hooks = [module.register_forward_hook(record_map) for module in network.modules()]
    try:
        with torch.enable_grad():
            logits = network(images)
            if not maps:
                return None
            maps[-1].retain_grad()
            (slope,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), maps[-1])
    finally:
        for hook in hooks:
            hook.remove()
    weights = slope.mean((2, 3), keepdim=True)
    heat = (weights * maps[-1]).sum(1).relu().detach()
    most = heat.amax((1, 2), keepdim=True).clamp_min(1e-12)
    return (heat / most).float().cpu().numpy()
