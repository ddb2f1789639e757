"""From a recipe's name or file and a command line to a `Config`."""

import dataclasses
import importlib.resources
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.command import IN_DIGITS, OTHER_BASE, close_to, make_parser, normalize, summary
from pipeline.config.names import check_names, check_null, check_settings, flag_names, rename_arguments, rename_settings
from pipeline.config.run import Config, RawConfig
from pipeline.config.time import Time, is_time, parse_time
from pipeline.config.yaml_text import Loader, dump_yaml
from pipeline.errors import UserError, complain

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_PATHS = ("run_dir", "resume", "data.root", "data.index", "model.weights")  #: options whose $VARIABLES are replaced
#: the schedule's times that follow its length; the warm-up shrinks with a shorter run, and does not grow with a longer
_TIMES, _SHRINKS = ("warmup_epochs", "milestones", "step_every"), ("warmup_epochs",)


def recipes_folder() -> Path:
    return Path(str(importlib.resources.files("pipeline") / "recipes"))


def recipe_names() -> list[str]:
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def resolve_recipe(name: str) -> str:
    """The file of a recipe: a path as it is, a name from the package. Raises UserError for neither."""
    name = str(Path(name).expanduser())  # a shell leaves --config=~/mine.yaml as it is
    if Path(name).is_file():
        try:
            Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--config {name} is not a text file ({error}); give a YAML file") from error
        return name
    packaged = recipes_folder() / f"{name}.yaml"
    if os.sep not in name and packaged.is_file():
        return str(packaged)
    if Path(name).is_dir():
        inside = Path(name) / "config.yaml"
        raise UserError(f"--config {name} is a folder; give {inside if inside.is_file() else 'a YAML file'}")
    close = close_to(name, recipe_names())
    hint = f"did you mean {close}? " if close else ""
    raise UserError(
        f"--config {name} is neither a file nor a recipe; {hint}the recipes are: {', '.join(recipe_names())}"
    )


def _read_recipe(name: str, warnings: list[str]) -> tuple[str, set[str]]:
    """What `--config` is given, and the names of its options: the recipe's file, or, if it has options under old names,
    its content with the new ones, as YAML; then `warnings` gets one line for each."""
    path = resolve_recipe(name)
    try:
        settings = _Unambiguous(Path(path).read_text(encoding="utf-8")).get_single_data()
    except OSError:  # the parser reports it
        return path, set()
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        raise UserError(f"--config {path} is not valid YAML: {reason}; fix the file") from error
    if not isinstance(settings, dict):
        what = "is empty" if settings is None else f"holds {str(settings)[:40]!r}, not options"
        raise UserError(f"--config {path} {what}; give a YAML file such as pipeline train --print_config writes")
    renamed = rename_settings(settings)
    empty = check_settings(settings, path)
    warnings += [f"{path}: {line}" for line in renamed]
    moved = _follow_run_folder(settings, Path(path))
    names = {f"{group}.{name}" for group, part in settings.items() if isinstance(part, dict) for name in part}
    return (dump_yaml(settings) if renamed or moved or empty else path), names


class _Unambiguous(Loader):
    """YAML in which a mapping has no key twice (the last one would count in silence), and no number is another one than
    it seems: 0100 is 64 in YAML 1.1 (octal), and 1:30 is 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Of a plain scalar that YAML takes for a number."""
        plain = super().construct_yaml_int if node.tag.endswith(":int") else super().construct_yaml_float
        value = plain(node)
        if OTHER_BASE.fullmatch(node.value) and value:
            says = f"{node.value} is the number {value} in YAML{IN_DIGITS}"
            raise yaml.constructor.ConstructorError(None, None, says, node.start_mark)
        return value


for _kind in ("int", "float"):
    _Unambiguous.add_constructor(f"tag:yaml.org,2002:{_kind}", _Unambiguous.construct_number)


def _follow_run_folder(settings: dict[str, Any], path: Path) -> bool:
    """Let the saved configuration of a run folder that was moved or copied name the folder that it lies in. True: it
    named another."""
    folder = path.resolve().parent
    is_run = path.name == "config.yaml" and (folder / "metrics.jsonl").exists()
    if not is_run or not settings.get("run_dir") or Path(str(settings["run_dir"])).expanduser().resolve() == folder:
        return False
    settings["run_dir"] = str(folder)
    return True


def make_config_parser(prog: str, options: type | None = None) -> "ArgumentParser":
    """A parser for `RawConfig`: `--config NAME_OR_FILE`, dotted overrides, `--print_config`.

    options: a dataclass with further options of the verb, which come first in the help (see `split_options`).
    """
    from jsonargparse import ActionConfigFile

    about = "Train a recipe. Run the same command again to resume the run in run_dir."
    usage = "--config NAME_OR_FILE [options]"
    parser = make_parser(prog, summary(options) if options else about, usage)
    if options is not None:
        parser.add_class_arguments(options, as_group=False)
    parser.add_argument("--config", action=ActionConfigFile, help="A recipe's name, or a YAML file.")
    parser.add_class_arguments(RawConfig, as_group=False)
    return parser


def parse_config(argv: list[str], verb: str = "train", options: type | None = None) -> Config:
    """The configuration that a command line asks for. Exits with code 2 and one line on an impossible one.

    options: the verb's own options, which `argv` no longer has; the help shows them too.
    """
    if {"-h", "--help"} & set(argv):
        make_config_parser(f"pipeline {verb}", options).parse_args(["--help"])
    argv, warnings = rename_arguments(normalize(list(argv), {f"--{name}" for name in flag_names()}))
    files: list[set[str]] = []
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            argv[i + 1], names = _read_recipe(argv[i + 1], warnings)
            files.append(names)
        elif argument.startswith("--config="):
            text, names = _read_recipe(argument.removeprefix("--config="), warnings)
            argv[i] = f"--config={text}"
            files.append(names)
    check_names(argv, {item.name for item in dataclasses.fields(options)} if options else set())
    for warning in dict.fromkeys(warnings):
        complain(f"pipeline {verb}", warning)
    parser = make_config_parser(f"pipeline {verb}")
    values = parser.parse_args(argv).as_dict()
    given = {item.partition("=")[0].removeprefix("--") for item in argv if item.startswith("--")}
    length, changed = "schedule.epochs", set(given)
    if any(length in names for names in files[:1]):  # of a file behind a recipe it is as if it were options
        changed |= set().union(*files[1:])
    if length in changed and "schedule.reference_epochs" not in changed:
        rest = _without_option(_without_option(argv, f"--{length}"), "--config", beyond=1)
        _scale_times(values, parser.parse_args(rest).as_dict()["schedule"]["epochs"], changed)
    return from_dict(values, frozenset(given - {"config"}))


def _expand(name: str, value: str) -> str:
    """A path with the values of the environment's variables, as a shell would give it from a command line. Raises
    UserError for a variable that is not set."""
    if "$" not in value or Path(value).exists():
        return value
    expanded = os.path.expandvars(value)
    unknown = re.search(r"\$(\w+|{\w+})", expanded)
    if unknown is not None:
        raise UserError(f"--{name} {value}: the environment has no variable {unknown[1].strip('{}')}; set it")
    return expanded


def _scale_times(values: dict[str, Any], own: Time, given: set[str]) -> None:
    """Let a recipe's times follow another length; `own` is the recipe's. given: options that the command line, or a
    file behind the recipe, has: their times stand as they are. Raises UserError where that leaves times that can't be
    worked out."""
    schedule, data = values["schedule"], values["data"]
    reference_epochs = schedule["reference_epochs"] if schedule["reference_epochs"] is not None else own
    schedule["reference_epochs"] = reference_epochs
    try:
        (length, unit), (was, own_unit), (base, base_unit) = map(
            parse_time, (schedule["epochs"], own, reference_epochs)
        )
    except ValueError:  # the checks say it
        return
    if data["ramp_epochs"] is not None and "data.ramp_epochs" not in given and unit == own_unit == "ep" and was:
        data["ramp_epochs"] = [round(epoch * length / was, 6) for epoch in data["ramp_epochs"]]
    fixed = sorted(f"schedule.{name}" for name in _TIMES if f"schedule.{name}" in given)
    if not fixed:
        return  # all follow: `Schedule` does it, which knows how many batches an epoch has
    if unit != base_unit or not base:
        raise UserError(
            f"--{fixed[0]} beside --schedule.epochs {schedule['epochs']}, of a recipe for {reference_epochs}: "
            "give --schedule.reference_epochs too, the length that all these times are for"
        )
    for name in _TIMES:
        if f"schedule.{name}" not in given:
            schedule[name] = _scaled(schedule[name], min(1, length / base) if name in _SHRINKS else length / base)
    schedule["reference_epochs"] = None


def _scaled(time: Any, factor: float) -> Any:
    if isinstance(time, list | tuple):
        return [_scaled(part, factor) for part in time]
    if time is None or not is_time(time):
        return time
    number, unit = parse_time(time)
    return f"{round(number * factor)}ba" if unit == "ba" else round(number * factor, 6)


def _without_option(argv: list[str], option: str, beyond: int = 0) -> list[str]:
    """The command line without an option and its value. beyond: how often it may be there."""
    kept, drop, value = [], False, False
    for item in argv:
        if not value:
            named = item.partition("=")[0] == option
            drop, beyond = named and beyond <= 0, beyond - named
        if not drop:
            kept.append(item)
        value = not value and item == option
    return kept


def load_config(path: Path, overrides: list[str] | None = None, verb: str = "train") -> Config:
    """A configuration saved by a run, with overrides from a command line."""
    return parse_config(["--config", str(path), *(overrides or [])], verb)


def from_dict(values: dict[str, Any], given: frozenset[str] = frozenset()) -> Config:
    """A `Config` from nested plain values as jsonargparse gives them. given: the options that the command line gave."""
    values = {key: value for key, value in values.items() if key != "config"}
    check_null(values)
    for name in _PATHS:
        part, _, key = name.rpartition(".")
        holder = values.get(part) if part else values
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            holder[key] = _expand(name, holder[key])
    for item in dataclasses.fields(RawConfig):
        kind = item.type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(values.get(item.name), dict):
            group = {k: tuple(v) if isinstance(v, list) else v for k, v in values[item.name].items()}
            values[item.name] = kind(**group)
    return RawConfig(**values).resolve(given)
