"""The bare network of a name: torchvision's, timm's, or a function of one's own."""

import difflib
import traceback
import warnings

import torch
import torchvision
from torch import nn

from pipeline.config import ModelConfig
from pipeline.config.networks import TIMM, import_timm, is_own, is_timm, is_torchvision, load_function
from pipeline.errors import TransientError, UserError
from pipeline.model.meta_init import meta_init


def model_names() -> list[str]:
    """The classification models of the installed torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def check_name(name: str, option: str = "--model.name") -> None:
    """Raises UserError, of this option, for a network that is not there."""
    if is_own(name):
        load_function(name, option)
        return
    bare, whose = name, "a torchvision classification model"
    if is_timm(name):
        timm, bare, whose = import_timm(name), name.removeprefix(TIMM), "a network of timm"
        if timm.is_model(bare):
            return
        names, lists = timm.list_models(), "timm.list_models() lists them"
    else:
        names, lists = model_names(), "torchvision.models.list_models() lists them"
    if bare not in names:
        prefix = name.removesuffix(bare)
        close = [prefix + one for one in difflib.get_close_matches(bare, names, n=3)]
        hint = f"did you mean {' or '.join(close)}?" if close else lists
        raise UserError(f"{option} {name} is not {whose}; {hint}")


def make_network(config: ModelConfig, num_classes: int, **extra: object) -> nn.Module:
    """The network with fresh weights, drawn from torch's global generator. extra: arguments for torchvision's.

    Raises UserError where it can't be made with these arguments.
    """
    name, kwargs = config.name, config.kwargs
    if is_timm(name) and "pretrained" in kwargs:
        raise UserError(f"--model.kwargs has pretrained; leave it out, and {save_timms_weights(name)}")
    if "num_classes" in kwargs:
        raise UserError(f"--model.kwargs has num_classes; give --model.num_classes {kwargs['num_classes']} instead")
    try:
        if is_own(name):
            network = load_function(name, "--model.name")(num_classes=num_classes, **kwargs)
        elif is_timm(name):
            bare = name.removeprefix(TIMM)
            network = import_timm(name).create_model(bare, pretrained=False, num_classes=num_classes, **kwargs)
        else:
            arguments: dict[str, object] = extra | kwargs
            network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)
    except (UserError, TransientError):
        raise
    except Exception as error:  # whatever a function of others raises
        if is_torchvision(name) and not kwargs:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        given = ", ".join(f"{key}={value!r}" for key, value in {"num_classes": num_classes, **kwargs}.items())
        raise UserError(
            f"--model.name {name} can't be made with {given}: {(str(error).splitlines() or [repr(error)])[0]} "
            f"({last.filename}:{last.lineno}); it must take num_classes, and what --model.kwargs has"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(f"--model.name {name} returned {type(network).__name__}; it must return a torch.nn.Module")
    if hasattr(network, "_orig_mod"):  # its weights would have other names, which no file of weights has
        raise UserError(
            f"--model.name {name} returned a compiled network; return it as it is, with --train.compile true"
        )
    return network


def save_timms_weights(name: str) -> str:
    """What to do for timm's published weights of one of its networks, in words."""
    return (
        "save timm's weights once, python -c \"import timm, torch; torch.save(timm.create_model("
        f"'{name.removeprefix(TIMM)}', pretrained=True).state_dict(), 'weights.pth')\", "
        "and give --model.weights weights.pth"
    )


def convert_sync_batchnorm(model: nn.Module, name: str) -> nn.Module:
    """Let BatchNorm's statistics be over all ranks. Raises UserError for a network without BatchNorm."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(f"--model.sync_batchnorm: {name} has no BatchNorm; give --model.sync_batchnorm false")
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        from timm.layers import convert_sync_batchnorm as convert  # torch's would lose the activations in timm's layers

        return convert(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def make_without_data(config: ModelConfig, num_classes: int, **extra: object) -> nn.Module:
    """`make_network` on the meta device, where nothing is allocated or computed; on the CPU for one that can't be made
    there, because it reads its own values."""
    try:
        with meta_init(), warnings.catch_warnings():  # of a function that loads weights, which have no place here
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)  # not asked for
            return make_network(config, num_classes, **extra)
    except (RuntimeError, UserError):
        if is_torchvision(config.name):
            raise
        return make_network(config, num_classes, **extra)


def make_to_try(config: ModelConfig, num_classes: int, size: int, **extra: object) -> nn.Module:
    """`make_without_data`, to try images on. With its data where it can't compute two images of size x size pixels
    without: its forward pass may read values, to branch on them."""
    network = make_without_data(config, num_classes, **extra)
    if not is_torchvision(config.name) and next(network.parameters(), torch.empty(0)).is_meta:
        try:
            with torch.no_grad():
                network.eval()(blank_images(network, 2, size))
        except Exception:  # whatever a network of others raises
            return make_network(config, num_classes, **extra)
    return network


def blank_images(network: nn.Module, count: int, size: int) -> torch.Tensor:
    """float [count, 3, size, size] on the network's device, as its input to try."""
    return torch.zeros(count, 3, size, size, device=next(network.parameters()).device)


def check_output(config: ModelConfig, size: int, num_classes: int) -> None:
    """Raises UserError, unless the network of another project gives logits [B, num_classes] for float [B, 3, H, W]."""
    network = make_to_try(config, num_classes, size).eval()
    if next(network.parameters(), None) is None:
        raise UserError(f"--model.name {config.name} has no parameters; there is nothing to train")
    try:
        with torch.no_grad():
            output = network(blank_images(network, 2, size))
    except Exception as error:  # whatever a network of others raises
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"--model.name {config.name} can't take float images [2, 3, {size}, {size}]: "
            f"{(str(error).splitlines() or [repr(error)])[0]} ({last.filename}:{last.lineno})"
        ) from error
    shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != [2, num_classes]:
        raise UserError(
            f"--model.name {config.name} gives {shape} for two images; it must give logits, [2, {num_classes}]"
        )
