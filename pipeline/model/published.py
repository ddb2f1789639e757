"""torchvision's published weights as something to score: their preprocessing and their published result."""

from dataclasses import dataclass

import torchvision
from torchvision.transforms import InterpolationMode

from pipeline.errors import UserError
from pipeline.model.networks import check_name

PREFIX = "torchvision:"


@dataclass(frozen=True)
class Published:
    """name: of the weights. outputs: classes. size, resize: pixels of validation. top1, top5: percent, as published on
    ImageNet, or None."""

    name: str
    outputs: int
    size: int
    resize: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    bicubic: bool
    top1: float | None
    top5: float | None


def find_published(model: str, name: str) -> Published:
    """What torchvision says of its weights `name` ("IMAGENET1K_V2", "DEFAULT") of `model`. Raises UserError."""
    check_name(model, "--model")
    known = torchvision.models.get_model_weights(model)
    if name not in known.__members__:
        names = ", ".join(known.__members__)
        raise UserError(f"--weights {PREFIX}{name} is not published for {model}; these are: {names}")
    weights = known[name]
    seen = weights.transforms()
    scores = weights.meta.get("_metrics", {}).get("ImageNet-1K", {})
    return Published(
        name=weights.name,
        outputs=len(weights.meta["categories"]),
        size=seen.crop_size[0],
        resize=seen.resize_size[0],
        mean=tuple(seen.mean),
        std=tuple(seen.std),
        bicubic=seen.interpolation is InterpolationMode.BICUBIC,
        top1=scores.get("acc@1"),
        top5=scores.get("acc@5"),
    )
