"""The arguments of `TrainLoader` and `EvalLoader`, checked, and in messages named as they are there."""

import dataclasses
import numbers
import operator
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar

from pipeline.config import AugmentConfig, Config, DataConfig, ModelConfig, RawConfig, ResolvedDataConfig, TrainConfig
from pipeline.errors import UserError

#: options of the command line that are arguments of the loaders under another name
_ARGUMENTS = {"train.global_batch_size": "batch_size", "train.seed": "seed", "augment.policy": "augment"}

Settings = TypeVar("Settings", DataConfig, AugmentConfig)


def make_config(
    data: DataConfig,
    augment: AugmentConfig,
    batch_size: int,
    seed: int = 0,
    num_classes: int | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Config:
    """The checked configuration of a loader. Raises UserError for the first impossible value, named as the arguments
    of the loaders are. names: option -> argument, of this loader alone."""
    data, augment = _checked(data, "data", names), _checked(augment, "augment", names)
    train = TrainConfig(global_batch_size=whole_number("batch_size", batch_size), seed=whole_number("seed", seed))
    model = ModelConfig(num_classes=None if num_classes is None else whole_number("num_classes", num_classes))
    try:
        return RawConfig(data=data, augment=augment, train=train, model=model).resolve()
    except UserError as error:
        raise UserError(as_argument(str(error), names)) from None


def whole_number(name: str, value: Any) -> int:
    """An argument as a Python int; it may be an integer of NumPy or torch. Raises UserError for anything else."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UserError(f"{name} is {value!r:.80}: give a whole number")


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _checked(settings: Settings, group: str, names: Mapping[str, str]) -> Settings:
    """The settings with the values of NumPy and torch as plain Python's, for the loader's state. Raises UserError for a
    value of another type."""
    plain = {}
    for name, kind in typing.get_type_hints(type(settings)).items():
        value = _plain(getattr(settings, name))
        if not _fits(value, kind):
            raise UserError(as_argument(f"--{group}.{name} is {value!r}: give {_told(kind)}", names))
        plain[name] = value
    return dataclasses.replace(settings, **plain)


#: type of a setting -> (types of what may be given, in words)
_KINDS: dict[Any, tuple[type, str]] = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "a text"),
    NoneType: (NoneType, "None"),
}


def _fits(value: Any, kind: Any) -> bool:
    """May a setting of this type have this value?"""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in parts
    if origin in (typing.Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple | list) and len(value) == len(parts) and all(map(_fits, value, parts))
    return kind not in _KINDS or (isinstance(value, _KINDS[kind][0]) and (kind is bool or not isinstance(value, bool)))


def _told(kind: Any) -> str:
    """What a setting of this type may be, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(parts)}"
    if origin in (typing.Union, UnionType):
        return " or ".join(map(_told, parts))
    return f"{len(parts)} numbers" if origin is tuple else _KINDS[kind][1]


def as_argument(message: str, names: Mapping[str, str] = MappingProxyType({})) -> str:
    """A message about an option of the command line, about the argument of that meaning: `--augment.mixup` is mixup.
    names: option -> argument, before those that all loaders have."""

    def rename(match: re.Match[str]) -> str:
        return names.get(match[1]) or _ARGUMENTS.get(match[1], match[1].partition(".")[2])

    return re.sub(r"(?:--)?\b((?:data|augment|train|model)\.[a-z_]+)", rename, message)


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """ "batch_size is 20 in the state and 24 in this loader", for each setting that differs in two flat mappings."""
    names = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    return [
        f"{as_argument(name)} is {saved.get(name)!r} in the state and {own.get(name)!r} in this loader"
        for name in names
    ]


def with_root(data: DataConfig | None, root: str | Path, **given: Any) -> DataConfig:
    """`data`, or the defaults, with a root, and with those of the other fields that are not None."""
    if data is not None and not isinstance(data, DataConfig):
        raise UserError(f"data is {data!r:.80}: give a pipeline.config.DataConfig")
    chosen = {name: value for name, value in given.items() if value is not None}
    if isinstance(data, ResolvedDataConfig):
        fields = {item.name: getattr(data, item.name) for item in dataclasses.fields(DataConfig)}
        data = DataConfig(**fields)
    return dataclasses.replace(data or DataConfig(), root="" if root is None else str(root), **chosen)
