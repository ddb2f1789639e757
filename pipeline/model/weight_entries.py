"""Where the state_dict is in a file that somebody else's training script saved, and its names without wrappers."""

import argparse
import datetime
import pathlib
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

#: entries that hold the weights, in the order in which they are looked for; averages last
ENTRIES = (
    "state_dict",  # torchvision's and PyTorch's examples, Lightning, older timm
    "model",  # torchvision's references
    "model_state_dict",  # PyTorch's tutorial
    "model_state",
    "model_dict",
    "net",
    "net_state_dict",
    "network",
    "weights",
    "params",
    "module",  # DeepSpeed
    "state",  # Composer
    "checkpoint",
    "model_ema",  # torchvision's references
    "state_dict_ema",  # timm
    "ema",
    "averaged_model",
)
#: torch.compile; DataParallel, DistributedDataParallel, AveragedModel; FullyShardedDataParallel; checkpoint_wrapper
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ATTRIBUTES = ("model.", "net.", "network.", "backbone.")  # the network in another module, as in Lightning
#: what stands beside it there, without being part of the network
_BESIDE = re.compile(r"(criterion|\w*loss\w*|\w*metrics?|\w*_acc|\w*accuracy\w*)\.", re.IGNORECASE)
_COUNTERS = ("total_ops", "total_params")  # buffers of thop's profile


def safe_globals() -> list[Any]:
    """What may stand beside the weights: options as argparse keeps them, paths, times, NumPy's scalars and arrays.
    Plain data, no code."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    scalar, array = multiarray.scalar, multiarray._reconstruct
    types = [
        type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "U")
    ]
    return [
        argparse.Namespace,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (array, "numpy.core.multiarray._reconstruct"),
        (array, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        *(pathlib.PosixPath, pathlib.PurePosixPath),
        *(datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone),
        *types,
        _encode,
    ]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


_encode.__module__, _encode.__qualname__, _encode.__name__ = "_codecs", "encode", "encode"


def find_state(loaded: Any) -> tuple[dict[str, torch.Tensor] | None, str]:
    """(the state_dict in what a file held, None without one; the entry that it was taken from, "" for the file itself).

    An entry is taken only where it leads to a state_dict, and an average of the weights only where there is nothing
    else.
    """
    state, taken = _search(loaded, set())
    return state, ".".join(taken)


def _search(loaded: Any, seen: set[int]) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """As `find_state`, the entries from the outermost. seen: id of each dict that was looked into; one may hold
    itself."""
    if not isinstance(loaded, dict) or id(loaded) in seen:
        return None, []
    seen.add(id(loaded))
    for name in ENTRIES:
        found, below = _search(loaded.get(name), seen)
        if found is not None:
            return found, [name, *below]
    if not all(isinstance(key, str) for key in loaded):
        return None, []
    state = _without(loaded, _strangers(list(loaded)))
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        return None, []
    return state, []


def _strangers(names: list[str]) -> set[str]:
    """The names that belong to no network: counters, and losses and metrics beside the attribute that is it."""
    found = {name for name in names if name == "n_averaged" or name.rpartition(".")[2] in _COUNTERS}
    if any(name.startswith(_ATTRIBUTES) for name in names):
        found |= {name for name in names if _BESIDE.match(name)}
    return found


def _without(state: dict[str, Any], names: set[str]) -> dict[str, Any]:
    if not names:
        return state
    kept = OrderedDict((key, value) for key, value in state.items() if key not in names)
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        setattr(kept, "_metadata", versions)  # noqa: B010 - torch's attribute, which no type declares
    return kept


def plain_names(names: list[str]) -> list[str]:
    """Names of parameters without the wrappers around the network or parts of it; as they are where two would become
    one."""
    plain = [".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names]
    for prefix in _ATTRIBUTES:
        if all(name.startswith(prefix) for name in plain):
            plain = [name.removeprefix(prefix) for name in plain]
    return plain if len(set(plain)) == len(names) else names


def named_as(state: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """A state_dict with plain names under the names of a network, whose own attributes may be called as wrappers are:
    `self.model`, `self.module`."""
    names = list(own)
    of_plain = dict(zip(plain_names(names), names, strict=True)) | {name: name for name in names}
    if all(of_plain.get(key, key) == key for key in state):
        return state
    return OrderedDict((of_plain.get(key, key), value) for key, value in state.items())
