"""Where the state_dict is in a file that somebody else's training script saved, and its names without wrappers."""

import argparse
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

#: entries that hold the weights, in the order in which they are looked for; averages last
ENTRIES = (
    "state_dict",  # torchvision's and PyTorch's examples, Lightning, older timm
    "model",  # torchvision's references
    "model_state_dict",  # PyTorch's tutorial
    "net",
    "network",
    "weights",
    "module",  # DeepSpeed
    "model_ema",  # torchvision's references
    "state_dict_ema",  # timm
    "ema",
)
_WRAPPERS = ("_orig_mod", "module")  # torch.compile; DataParallel, DistributedDataParallel, AveragedModel
_ATTRIBUTES = ("model.", "net.", "network.")  # the network as an attribute of another module, as in Lightning


def safe_globals() -> list[Any]:
    """What may stand beside the weights: options as argparse keeps them, and NumPy's scalars. Plain data, no code."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    types = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    return [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *types,
        _encode,
    ]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


_encode.__module__, _encode.__qualname__, _encode.__name__ = "_codecs", "encode", "encode"


def find_state(loaded: Any) -> tuple[dict[str, torch.Tensor] | None, str]:
    """(the state_dict in what a file held, None without one; the entry that it was taken from, "" for the file itself).

    An average of the weights is taken only where there is nothing else.
    """
    taken: list[str] = []
    state = loaded
    while isinstance(state, dict):
        name = next((key for key in ENTRIES if isinstance(state.get(key), dict)), None)
        if name is None:
            break
        taken.append(name)
        state = state[name]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return None, ""
    if "n_averaged" in state:  # torch.optim.swa_utils.AveragedModel counts there
        state = _without(state, "n_averaged")
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        return None, ""
    return state, ".".join(taken)


def _without(state: dict[str, Any], name: str) -> dict[str, Any]:
    kept = OrderedDict((key, value) for key, value in state.items() if key != name)
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        setattr(kept, "_metadata", versions)  # noqa: B010 - torch's attribute, which no type declares
    return kept


def plain_names(names: list[str]) -> list[str]:
    """Names of parameters without the wrappers around the network or parts of it."""
    plain = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
    for prefix in _ATTRIBUTES:
        if all(name.startswith(prefix) for name in plain):
            plain = [name.removeprefix(prefix) for name in plain]
    return plain
