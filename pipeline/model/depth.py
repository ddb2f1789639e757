"""How deep in a network a parameter lies: for rates that fall towards the input."""

from collections.abc import Iterator

from torch import nn
from torchvision.models.regnet import AnyStage
from torchvision.models.vision_transformer import Encoder

from pipeline.model.heads import NORMS, in_heads

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, AnyStage, Encoder)


def _walk(module: nn.Module, place: str) -> Iterator[tuple[str, nn.Module]]:
    """The layers and blocks of a network in their order: containers are opened, as are the stages of timm's networks,
    which have no parameters of their own; blocks are not."""
    for name, child in module.named_children():
        is_stage = type(child).__name__.endswith("Stage") and not any(True for _ in child.parameters(recurse=False))
        if type(child) in _CONTAINERS or isinstance(child, nn.ModuleDict) or is_stage:
            yield from _walk(child, f"{place}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{place}{name}", child


def layer_numbers(model: nn.Module, heads: tuple[str, ...]) -> dict[str, int]:
    """Parameter name -> number of its layer: 0 at the input, the highest in the heads.

    A layer is a block (residual, dense, encoder, ...) or a layer that stands alone; a normalization that stands alone
    belongs to what comes before it, and a parameter outside all layers (class token, positions) to the first.
    """
    layers: list[list[str]] = []
    for path, module in _walk(model, ""):
        if layers and isinstance(module, NORMS):
            layers[-1].append(path)
        else:
            layers.append([path])
    places = {path: number for number, paths in enumerate(layers) for path in paths}
    last = len(layers) - 1
    numbers = {}
    for name, _ in model.named_parameters():
        parts = name.split(".")
        known = [places[p] for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in places]
        numbers[name] = last if in_heads(name, heads) else known[0] if known else 0
    return numbers
