"""From a recipe's name or file and a command line to a `Config`."""

import dataclasses
import importlib.resources
import os
from pathlib import Path
from typing import Any

from pipeline.command import make_parser, normalise
from pipeline.config.run import Config
from pipeline.config.time import parse_time
from pipeline.errors import UserError


def recipes_folder() -> Path:
    return Path(str(importlib.resources.files("pipeline") / "recipes"))


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def resolve_recipe(name: str) -> str:
    """The file of a recipe: a path as it is, a name from the package. Raises UserError for neither."""
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--config {name} is no text file ({error}); give a YAML file") from error
        return name
    packaged = recipes_folder() / f"{name}.yaml"
    if os.sep not in name and packaged.is_file():
        return str(packaged)
    raise UserError(f"--config {name} is neither a file nor a recipe; the recipes are: {', '.join(recipe_names())}")


def make_config_parser(prog: str):
    """A parser for `Config`: `--config NAME_OR_FILE`, dotted overrides, `--print_config`."""
    from jsonargparse import ActionConfigFile, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = make_parser(prog, "Train a recipe. The same command again continues the run in run_dir.")
    parser.add_argument("--config", action=ActionConfigFile, help="a recipe's name or a YAML file")
    parser.add_class_arguments(Config)
    return parser


def _flags(item: Any, prefix: str = "--") -> set[str]:
    names = set()
    for part in dataclasses.fields(item):
        if dataclasses.is_dataclass(part.type):
            names |= _flags(part.type, f"{prefix}{part.name}.")
        elif part.type is bool:
            names.add(prefix + part.name)
    return names


def parse_config(argv: list[str], verb: str = "train") -> Config:
    """The configuration that a command line asks for. Exits with code 2 and one line on an impossible one."""
    argv = normalise(list(argv), _flags(Config))
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            argv[i + 1] = resolve_recipe(argv[i + 1])
        elif argument.startswith("--config="):
            argv[i] = f"--config={resolve_recipe(argument.removeprefix('--config='))}"
    parser = make_config_parser(f"pipeline {verb}")
    values = parser.parse_args(argv).as_dict()
    if values["schedule"]["made_for"] is None:
        shorter = [item for item in argv if item.partition("=")[0] == "--schedule.epochs"]
        if shorter:  # the recipe's milestones and warm-up are for the recipe's epochs
            rest = _without(argv, "--schedule.epochs")
            values["schedule"]["made_for"] = parser.parse_args(rest).as_dict()["schedule"]["epochs"]
            _stretch_ramp(values, argv)
    return from_dict(values)


def _stretch_ramp(values: dict[str, Any], argv: list[str]) -> None:
    """The ramp of the images' size moves with the run's length, unless it is given or the length is in batches."""
    ramp, schedule = values["data"]["ramp_epochs"], values["schedule"]
    given = any(item.partition("=")[0] == "--data.ramp_epochs" for item in argv)
    try:
        (there, unit), (here, other) = parse_time(schedule["made_for"]), parse_time(schedule["epochs"])
    except ValueError:  # the checks say it
        return
    if ramp is not None and not given and unit == other == "ep" and there:
        values["data"]["ramp_epochs"] = [round(epoch * here / there, 6) for epoch in ramp]


def _without(argv: list[str], option: str) -> list[str]:
    """The command line without an option and its value."""
    kept, drop = [], False
    for item in argv:
        if not drop and item.partition("=")[0] != option:
            kept.append(item)
        drop = not drop and item == option
    return kept


def load_config(path: Path, overrides: list[str] | None = None, verb: str = "train") -> Config:
    """A configuration saved by a run, with overrides from a command line."""
    return parse_config(["--config", str(path), *(overrides or [])], verb)


def from_dict(values: dict[str, Any]) -> Config:
    """A `Config` from nested plain values as jsonargparse gives them."""
    values = {key: value for key, value in values.items() if key != "config"}
    for item in dataclasses.fields(Config):
        if dataclasses.is_dataclass(item.type) and isinstance(values.get(item.name), dict):
            group = {k: tuple(v) if isinstance(v, list) else v for k, v in values[item.name].items()}
            values[item.name] = item.type(**group)
    return Config(**values)
