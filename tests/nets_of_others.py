"""Networks of one's own for tests, as a user would bring them."""

import torch
from torch import nn


def tiny(num_classes: int, width: int = 8) -> nn.Module:
    """No attribute is called fc or classifier, no BatchNorm, two dropouts."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2),
        nn.GroupNorm(1, width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(width, num_classes),
    )


tiny.default_cfg = {"input_size": (3, 40, 40), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 0.8}


def lite0(num_classes: int) -> nn.Module:
    """EfficientNet-Lite0 (Google 2020) by the package efficientnet-lite-pytorch."""
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)


lite0.default_cfg = {
    "input_size": (3, 224, 224),
    "mean": (127 / 255,) * 3,
    "std": (128 / 255,) * 3,
    "crop_pct": 0.875,
    "interpolation": "bilinear",
}


def fine_tuned(num_classes: int) -> nn.Module:
    """Loads weights of its own for other classes, as a function for fine-tuning does."""
    network = tiny(10)
    network.load_state_dict({key: torch.full(value.shape, 2.0) for key, value in network.state_dict().items()})
    network[-1] = nn.Linear(8, num_classes)
    return network


def headless(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def number(num_classes: int) -> int:
    return num_classes


def no_classes(width: int = 8) -> nn.Module:
    return tiny(10, width)


class Pairs(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.network = tiny(num_classes)

    def forward(self, images: torch.Tensor) -> dict:
        return {"logits": self.network(images)}


def divides(num_classes: int) -> nn.Module:
    return tiny(num_classes, width=int(num_classes / 0))


class Indexes(Pairs):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return [self.network(images)][1]


class Branches(Pairs):
    """What it computes depends on values: it can't be tried without them, and has no graph."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(images)
        return 2 * logits if logits.mean() > 0 else logits


def frozen(num_classes: int) -> nn.Module:
    return tiny(num_classes).requires_grad_(False)


def compiled(num_classes: int) -> nn.Module:
    return torch.compile(tiny(num_classes))


def tied(num_classes: int) -> nn.Module:
    """Two layers share their weights."""
    layer = nn.Conv2d(8, 8, 1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), layer, nn.ReLU(), layer, *tiny(num_classes)[4:])


class Prototypes(nn.Module):
    """Its head is no layer, and its attributes are called as wrappers are."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.model = nn.ModuleDict({"module": tiny(8)[:-1], "beside": nn.Linear(8, 8)})
        self.model.classes = nn.Parameter(torch.randn(num_classes, 8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model["beside"](self.model["module"](images)) @ self.model.classes.T


class Bare(nn.Module):
    """Its head is a parameter of the network itself."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body, self.classes = tiny(8), nn.Parameter(torch.randn(8, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images) @ self.classes


class Remembers(Bare):
    """Its state is not of tensors alone."""

    def get_extra_state(self) -> dict:
        return {"version": 2}

    def set_extra_state(self, state: dict) -> None:
        assert state == {"version": 2}
