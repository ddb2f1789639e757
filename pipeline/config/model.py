"""The group `model`: the network, its head, and what it starts from."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.fields import Check, at_least_zero, below_one, positive

#: pixels of the side that a network was made for, where that is not 224 (torchvision's published weights)
INPUT_SIZES = {
    "inception_v3": 299,
    **dict(zip((f"efficientnet_b{i}" for i in range(1, 8)), (240, 288, 300, 380, 456, 528, 600), strict=True)),
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
    **dict.fromkeys(("swin_v2_t", "swin_v2_s", "swin_v2_b"), 256),
}


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "resnet152"
    """A torchvision classification model; `timm:NAME`, one of timm; or `MODULE:FUNCTION`, a function of your own that
    takes num_classes and returns a network."""
    kwargs: dict = field(default_factory=dict, hash=False)  # not dict[str, Any]: there "5" would become 5
    """Further arguments of the network: {"width": 64}."""
    num_classes: int | None = None
    """Outputs of the head; default: the classes of the data set."""
    zero_init_residual: bool = False
    """Start each residual block as the identity: gamma of its last BatchNorm is 0 (Goyal et al. 2017, 5.1)."""
    head_init_std: float | None = None
    """Draw the head's initial weights from a Gaussian of this standard deviation, and start its bias at 0 (Goyal et al.
    2017, 5.1: 0.01); default: the network's own."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks; default: over each rank's own images, as in Goyal et al. 2017."""
    aux_weight: float | None = None
    """Weight of the auxiliary heads' losses of googlenet and inception_v3; default: as published (0.3, 0.4). 0: without
    these heads."""
    dropout: float = 0.0
    """Share of the values before the head that is dropped in training, besides what the network drops by itself."""
    stochastic_depth: float = 0.0
    """Probability that a sample skips the last residual branch in training (Huang et al. 2016); it falls linearly to 0
    for the first."""
    blurpool: Literal["none", "convs", "all"] = "none"
    """Blur before subsampling (Zhang 2019). convs: before strided convolutions, as FFCV; all: in strided max pooling
    too, padded by reflection, as Zhang and timm."""
    weights: str | None = None
    """Start from trained weights: torchvision's published ones by name (DEFAULT, IMAGENET1K_V1, ...), or a file. A head
    for other classes starts fresh."""
    keep_head: bool = False
    """With weights: keep their head even if the data set has other classes, as long as they are as many; default: it
    starts fresh."""
    freeze: str | None = None
    """Parameters that are not trained: "body" (all but the head), or patterns of names: "conv1.*,layer1.*"."""


def check_model(c: ModelConfig) -> Iterator[Check]:
    """Impossible values of the group `model`."""
    yield positive("model.num_classes", c.num_classes, optional=True)
    yield positive("model.head_init_std", c.head_init_std, optional=True)
    yield at_least_zero("model.aux_weight", c.aux_weight or 0)
    yield below_one("model.dropout", c.dropout)
    yield below_one("model.stochastic_depth", c.stochastic_depth)
