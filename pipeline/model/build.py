"""A classification network by name, with a head for the data set's classes."""

from collections.abc import Mapping

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from pipeline.config import INPUT_SIZES, ModelConfig
from pipeline.config.networks import preprocessing_of
from pipeline.errors import UserError
from pipeline.model.drops import tie_drops
from pipeline.model.heads import drop_before_head, freeze, head_parameters, is_auxiliary
from pipeline.model.networks import check_name, convert_sync_batchnorm, make_network
from pipeline.model.regularize import add_blurpool, add_stochastic_depth
from pipeline.model.weights import is_published

#: weight of the auxiliary heads' losses as published: Szegedy et al. 2015 (GoogLeNet), 2016 (Inception v3: torchvision
#: has the one arm, and the weight of its reference)
AUXILIARY_WEIGHTS = {"googlenet": 0.3, "inception_v3": 0.4}


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The model with fresh weights, drawn from torch's global generator.

    num_classes: outputs of the head. Takes float [B, 3, H, W], gives logits [B, num_classes]; in training GoogLeNet and
    Inception v3 give a tuple, the logits first and then the auxiliary heads'. `start_from` loads `config.weights`. Its
    attribute `drop_keys` holds the keys that drop-out and stochastic depth follow; None where nothing is dropped.
    Raises UserError for a name that is not known, or an option that the model has no use for.
    """
    check_name(config.name)
    extra: dict[str, object] = {}
    if config.name in AUXILIARY_WEIGHTS:
        extra = {"aux_logits": auxiliary_weight(config) > 0, "init_weights": True}
        extra["transform_input"] = transforms_input(config)
    if config.name.startswith("vit_"):
        extra["image_size"] = native_image_size(config)
    model = make_network(config, num_classes, **extra)
    if config.zero_init_residual:
        zero_init_residual(model)
    if config.head_init_std is not None:
        init_heads(model, config, config.head_init_std)
    if config.sync_batchnorm:  # before any hook is on a layer that this replaces
        model = convert_sync_batchnorm(model, config.name)
    if config.stochastic_depth:
        add_stochastic_depth(model, config.name, config.stochastic_depth)
    if config.blurpool != "none":
        add_blurpool(model, config.name, config.blurpool == "all")
    if config.dropout:
        drop_before_head(model, config, config.dropout)
    if config.freeze:
        freeze(model, config, config.freeze)
    model.drop_keys = tie_drops(model)  # type: ignore[assignment]  # an attribute that is no module
    return model


def transforms_input(config: ModelConfig) -> bool:
    """Does the network convert ImageNet's usual means to the 0.5 that its published weights expect? GoogLeNet's and
    Inception v3's do, where a run starts from them."""
    return config.name in AUXILIARY_WEIGHTS and is_published(config)


def native_image_size(config: ModelConfig) -> int:
    """Pixels of the side of the images that the network is made for; a vision transformer takes no others. It follows
    the published weights that it starts from (384 for some), or is torchvision's."""
    if config.name.startswith("vit_") and is_published(config):
        known = torchvision.models.get_model_weights(config.name)
        if config.weights in known.__members__:
            return known[config.weights].meta["min_size"][0]
    asked = config.kwargs.get("img_size", config.kwargs.get("image_size"))
    if isinstance(asked, int):
        return asked
    return preprocessing_of(config.name).get("image_size") or INPUT_SIZES.get(config.name, 224)


def auxiliary_weight(config: ModelConfig) -> float:
    """The weight of the auxiliary heads' losses; 0: there are none."""
    published = AUXILIARY_WEIGHTS.get(config.name)
    if published is None and config.aux_weight:
        names = " and ".join(AUXILIARY_WEIGHTS)
        raise UserError(f"--model.aux_weight {config.aux_weight}: {config.name} has no auxiliary head; {names} have")
    return (published or 0.0) if config.aux_weight is None else config.aux_weight


def auxiliary_weight_of(name: str, state: Mapping[str, torch.Tensor]) -> float | None:
    """`aux_weight` of the network that a whole state_dict is of: 0 for one without the auxiliary heads, else None."""
    without = name in AUXILIARY_WEIGHTS and not any(map(is_auxiliary, state))
    return 0.0 if without else None


def zero_init_residual(model: nn.Module) -> None:
    """Set gamma of the last BatchNorm of each residual block to 0 (Goyal et al. 2017, section 5.1)."""
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock | Bottleneck)]
    if not blocks:
        raise UserError(
            "--model.zero_init_residual is for ResNets, which this is not; give --model.zero_init_residual false"
        )
    for block in blocks:
        nn.init.zeros_(block.bn3.weight if isinstance(block, Bottleneck) else block.bn2.weight)


def init_heads(model: nn.Module, config: ModelConfig, std: float) -> None:
    """Draw the weights of all heads, auxiliary ones too, from a Gaussian; biases become 0."""
    for name in head_parameters(config):
        parameter = model.get_parameter(name)
        nn.init.normal_(parameter, std=std) if parameter.ndim > 1 else nn.init.zeros_(parameter)


def count_parameters(model: nn.Module) -> int:
    """The number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class Normalized(nn.Module):
    """uint8 [B, H, W, 3] in, logits out: casts and normalizes on the device, then calls `model`.

    mean, std: of each channel, 0 to 1. The permuted image is channels_last as it is, without a copy.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool):
        super().__init__()
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        self.channels_last = channels_last
        means, deviations = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
        self.register_buffer("scale", 1 / (255 * deviations.view(1, 3, 1, 1)), persistent=False)
        shift = -means / deviations
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W]."""
        pixels = images.permute(0, 3, 1, 2)
        if not self.channels_last:
            pixels = pixels.contiguous()
        return torch.addcmul(self.shift, pixels.float(), self.scale)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.normalize(images))
