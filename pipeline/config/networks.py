"""Networks (and losses) that are named by where they come from: `timm:resnet152d`, or `my_package.nets:tiny_resnet`.

Nothing heavy is imported here unless such a name is given.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

TIMM = "timm:"  #: beginning of the name of a network of timm


def is_timm(name: str) -> bool:
    return name.startswith(TIMM)


def is_own(name: str) -> bool:
    """Is it a function of the user's, `MODULE:FUNCTION`?"""
    return ":" in name and not is_timm(name)


def is_torchvision(name: str) -> bool:
    return ":" not in name


def load_function(name: str, option: str) -> Callable[..., Any]:
    """The function that `MODULE:FUNCTION` names; the module is installed, or in the current folder. Raises UserError,
    of this option, where it can't be imported."""
    module, _, function = name.partition(":")
    if module.endswith(".py") or os.sep in module:
        raise UserError(
            f"{option} {name}: {module} is a file; name its module, and start in the folder that holds it: "
            f"{Path(module).stem}:{function}"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        missing = isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "\0")
        where = "" if missing else f" ({last.filename}:{last.lineno})"
        raise UserError(
            f"{option} {name}: {module} can't be imported: {reason}{where}; install it, or start where its file is"
        ) from error
    if not callable(found):
        raise UserError(f"{option} {name}: {module} has no function '{function}'; give MODULE:FUNCTION")
    return found


def import_timm(name: str) -> Any:
    """The module timm. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"--model.name {name}: timm can't be imported ({error}); pip install timm") from error


@cache
def preprocessing_of(name: str) -> Mapping[str, Any]:
    """What images a network was made for: image_size (pixels), mean, std, val_crop_ratio, interpolation, as far as it
    says. timm's default configuration of the network; or, of an own one, an attribute `default_cfg` of the function,
    with timm's keys (input_size, mean, std, crop_pct, interpolation). Empty for torchvision's."""
    if is_timm(name):
        timm = import_timm(name)
        found = timm.models.get_pretrained_cfg(name.removeprefix(TIMM), allow_unregistered=True)
        said = {} if found is None else found.to_dict()
    elif is_own(name):
        said = getattr(load_function(name, "--model.name"), "default_cfg", None) or {}
    else:
        return {}
    known: dict[str, Any] = {}
    try:
        if said.get("input_size"):
            known["image_size"] = int(said["input_size"][-1])
        for key in ("mean", "std"):
            if said.get(key):
                red, green, blue = map(float, said[key])
                known[key] = (red, green, blue)
        if said.get("crop_pct"):
            known["val_crop_ratio"] = float(said["crop_pct"])
        if said.get("interpolation") in ("bilinear", "bicubic"):
            known["interpolation"] = said["interpolation"]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"--model.name {name}: its default_cfg can't be read ({error}); give input_size (3, H, W), mean and std of "
            "three numbers, crop_pct"
        ) from error
    return known
