"""Names of options: their earlier names, the names that other trainers use, and the nearest one to a misspelling."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from pipeline.config.run import RawConfig
from pipeline.errors import UserError

#: options that have been renamed: still accepted, with one line of warning
RENAMED = {
    "augment.cutmix_share": "augment.mixup_switch_prob",
    "augment.erase": "augment.random_erase",
    "augment.mix": "augment.mix_prob",
    "augment.ops": "augment.num_ops",
    "checkpoint.wait_minutes": "checkpoint.outage_timeout_minutes",
    "optim.body_lr": "optim.body_lr_factor",
    "optim.clip_adaptive": "optim.agc",
    "schedule.made_for": "schedule.reference_epochs",
    "train.profile": "train.profile_steps",
    "train.timeout_s": "train.hang_timeout_s",
}

#: what torchvision's references and timm call some options -> the option here
ELSEWHERE = {
    "a": "model.name",
    "aa": "augment.policy",
    "accumulate_grad_batches": "train.micro_batch_size",
    "amp": "train.precision",
    "amp_dtype": "train.precision",
    "arch": "model.name",
    "auto_augment": "augment.policy",
    "b": "train.global_batch_size",
    "batch_size": "train.global_batch_size",
    "bce_loss": "optim.loss",
    "checkpoint_hist": "checkpoint.keep",
    "class_weights": "optim.loss",
    "clip_grad": "optim.clip_norm",
    "clip_grad_norm": "optim.clip_norm",
    "color_jitter": "augment.jitter",
    "crop_pct": "data.val_crop_ratio",
    "cutmix_alpha": "augment.cutmix",
    "data_dir": "data.root",
    "data_path": "data.root",
    "decay_epochs": "schedule.step_every",
    "decay_rate": "schedule.gamma",
    "drop_path": "model.stochastic_depth",
    "grad_accum_steps": "train.micro_batch_size",
    "gradient_clip_val": "optim.clip_norm",
    "initial_checkpoint": "model.weights",
    "input_size": "data.image_size",
    "j": "data.threads",
    "learning_rate": "optim.lr",
    "log_interval": "tracking.print_every_s",
    "lr_scheduler": "schedule.name",
    "lr_step_size": "schedule.step_every",
    "lr_warmup_decay": "schedule.warmup_start",
    "lr_warmup_epochs": "schedule.warmup_epochs",
    "max_epochs": "schedule.epochs",
    "mixup_alpha": "augment.mixup",
    "model_ema": "ema.decay",
    "model_ema_decay": "ema.decay",
    "num_workers": "data.threads",
    "opt": "optim.name",
    "output": "run_dir",
    "output_dir": "run_dir",
    "pretrained": "model.weights",
    "print_freq": "tracking.print_every_s",
    "ra_reps": "augment.repeats",
    "ra_sampler": "augment.repeats",
    "ratio": "data.crop_ratio",
    "reprob": "augment.random_erase",
    "scale": "data.crop_area",
    "sched": "schedule.name",
    "smoothing": "optim.label_smoothing",
    "sync_bn": "model.sync_batchnorm",
    "train_crop_size": "data.image_size",
    "val_crop_size": "data.val_size",
    "warmup_lr": "schedule.warmup_start",
    "wd": "optim.weight_decay",
    "workers": "data.threads",
}

#: groups of options that are often given as if they were one -> the option that is meant
GROUPS = {
    "augment": "augment.policy",
    "data": "data.root",
    "ema": "ema.decay",
    "model": "model.name",
    "optim": "optim.name",
    "schedule": "schedule.name",
    "tracking": "tracking.wandb",
}

#: what other trainers' files call a file that they build on
INCLUDES = ("_base_", "base", "config", "defaults", "extends", "include", "includes", "inherit")

#: options of the parser itself
BUILT_IN = ("config", "help", "print_config")


def option_names(item: Any = RawConfig, prefix: str = "") -> Iterator[str]:
    """The names of all options and groups of options, dotted."""
    for part in dataclasses.fields(item):
        if dataclasses.is_dataclass(part.type):
            yield from option_names(part.type, f"{prefix}{part.name}.")
        yield prefix + part.name


def flag_names(item: Any = RawConfig, prefix: str = "") -> set[str]:
    """The names of all boolean options, dotted."""
    names: set[str] = set()
    for part in dataclasses.fields(item):
        if dataclasses.is_dataclass(part.type):
            names |= flag_names(part.type, f"{prefix}{part.name}.")
        elif part.type is bool:
            names.add(prefix + part.name)
    return names


def rename_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the command line with renamed options under their new names, one warning for each)."""
    renamed, warnings = [], []
    for item in argv:
        name, equals, value = item.partition("=")
        new = RENAMED.get(name.removeprefix("--")) if name.startswith("--") else None
        if new is not None:
            warnings.append(f"{name} is now called --{new}")
            item = f"--{new}{equals}{value}"
        renamed.append(item)
    return renamed, warnings


def rename_settings(settings: dict[str, Any]) -> list[str]:
    """Give renamed options of a recipe or of a saved configuration, read from YAML, their new names, in place.

    Returns one warning for each. Where both names are given, the new one counts.
    """
    warnings = []
    for old, new in RENAMED.items():
        (group, old_key), new_key = old.split("."), new.split(".")[1]
        options = settings.get(group)
        if isinstance(options, dict) and old_key in options:
            warnings.append(f"{old} is now called {new}")
            value = options.pop(old_key)
            options.setdefault(new_key, value)
    return warnings


def rename_flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint, by dotted name, under today's names."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def check_names(argv: list[str], own: Set[str] = frozenset()) -> None:
    """Raises UserError for the first unknown option for which a known one is probably meant, and names that one.

    Such are the names of other trainers (--lr, --epochs, -b, --arch), misspellings (--optim.lrr), and --model resnet50,
    as model is a group of options. `argv` is normalized (see `pipeline.command.normalize`). own: further
    options of the verb, which it no longer has.
    """
    known, groups = {*option_names(), *own}, set(group_names())
    position = 0
    while position < len(argv):
        item = argv[position]
        position += 1
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"--?[A-Za-z][\w.]*", name):
            continue
        dashes, name = name[: -len(name.lstrip("-"))], name.lstrip("-")
        if not equals and name not in ("h", "help", "print_config"):
            value = argv[position] if position < len(argv) else ""
            position += 1
        if name in groups and not Path(value).is_file() and not value.lstrip().startswith("{"):
            hint = f"did you mean --{GROUPS[name]} {value}?" if name in GROUPS else f"give one of them, --{name}.NAME"
            raise UserError(f"--{name} {value}: {name} is a group of options; {hint}")
        if name in known or name in BUILT_IN or item == "-h":
            continue
        meant = nearest(name, known)
        if meant:
            raise UserError(f"unknown option {dashes}{name}; did you mean {' or '.join(f'--{one}' for one in meant)}?")


def check_settings(settings: dict[str, Any], path: str) -> bool:
    """Raises UserError for a group of options in a recipe that is a single value, and for an unknown option. Groups
    without options are taken out of `settings`; True: there were some."""
    known, groups = set(option_names()), set(group_names())
    empty = [name for name in groups if name in settings and settings[name] is None]
    for name in empty:
        del settings[name]
    for group, options in settings.items():
        if group in groups and not isinstance(options, dict):
            said = f"--config {path}: {group} is {str(options)[:40]!r}, but it is a group of options"
            if isinstance(options, str) and group in GROUPS:
                example = GROUPS[group].partition(".")[2]
                raise UserError(f"{said}; did you mean {group}: {{{example}: {options[:40]}}}?")
            raise UserError(f"{said}; write them below it, as pipeline train --print_config does")
        names = [f"{group}.{name}" for name in options] if group in groups else [str(group)]
        for name in names:
            if name not in known:
                meant = nearest(name, known)
                hint = f"did you mean {' or '.join(meant)}?" if meant else "see pipeline train --help"
                if name in INCLUDES:
                    other = options if isinstance(options, str) else "RECIPE"
                    hint = f"to build on another recipe give both: --config {other} --config {path}"
                raise UserError(f"--config {path}: unknown option {name}; {hint}")
    check_null(settings, f"--config {path}: ")
    return bool(empty)


def check_null(settings: Mapping[str, Any], where: str = "--") -> None:
    """Raises UserError, which begins with `where`, for an option that is null, as one without a value is in YAML, and
    has no such value."""
    hints = typing.get_type_hints(RawConfig)
    flat = {name: (value, hints[name]) for name, value in settings.items() if name in hints}
    for group in set(group_names()) & flat.keys():
        options, kind = flat.pop(group)
        kinds, given = typing.get_type_hints(kind), options if isinstance(options, dict) else {}
        flat |= {f"{group}.{name}": (value, kinds[name]) for name, value in given.items() if name in kinds}
    for name, (value, kind) in flat.items():
        if value is None and type(None) not in typing.get_args(kind):
            raise UserError(f"{where}{name} is null: give a value, or leave it out")


def group_names() -> Iterator[str]:
    """The names of the groups of options."""
    return (part.name for part in dataclasses.fields(RawConfig) if dataclasses.is_dataclass(part.type))


def nearest(name: str, known: set[str]) -> list[str]:
    """The options that are probably meant by an unknown name, at most three; [] where none is near."""
    last = name.rpartition(".")[2]
    elsewhere = ELSEWHERE.get(last)
    if elsewhere is not None:
        return [elsewhere]
    same = sorted(one for one in known if one.endswith(f".{last}") or one.replace(".", "_") == name)
    if same:
        return difflib.get_close_matches(name, same, n=1, cutoff=0.7) or same[:3]
    if "." in name:
        return difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    by_last = {one.rpartition(".")[2]: one for one in sorted(known, reverse=True)}
    return [by_last[one] for one in difflib.get_close_matches(name, by_last, n=1, cutoff=0.7)]
