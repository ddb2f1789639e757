"""The verb `recipes`: lists the recipes, each with its source and its published and measured figures."""

import itertools
import shutil
import textwrap

import yaml

from pipeline.command import run_command
from pipeline.counts import count

NOT_IMAGENET = ("cifar10-", "smoke")  # prefixes of names


def recipes(card: str | None = None) -> None:
    """List the recipes that come with the package.

    Args:
        card: a GPU (h100, a100-80gb, ...): also show the least GPU-hours that each ImageNet recipe takes on it, by its
            roofline (see `pipeline estimate`).
    """
    from pipeline.config import load_config, recipe_names, recipes_folder

    hours = None
    if card is not None:
        from pipeline.insight.estimate.gpu_hours import GpuHours

        hours = GpuHours(card)
    width = max(map(len, recipe_names()))
    columns = min(shutil.get_terminal_size((120, 24)).columns, 120)
    for name in recipe_names():
        path = recipes_folder() / f"{name}.yaml"
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        about = written.get("about", {})
        paragraphs = [about.get("what", "")]
        facts = [f"{_length(written['schedule']['epochs'])}, batch {written['train']['global_batch_size']:,}"]
        if hours is not None and not name.startswith(NOT_IMAGENET):
            config = load_config(path, verb="recipes")
            facts.append(f"at least {hours.of(config):,.0f} GPU-hours on {card}")
        paragraphs.append("; ".join(facts))
        paragraphs += [
            f"{key}: {as_text(about[key])}"
            for key in ("published", "goal", "measured", "differs", "missing")
            if key in about
        ]
        lines = [line for text in paragraphs for line in textwrap.wrap(text, max(40, columns - width - 1)) or [""]]
        for label, line in zip(itertools.chain([name], itertools.repeat("")), lines, strict=False):
            print(f"{label:{width}} {line}".rstrip(), flush=True)


def as_text(said: object) -> str:
    """What a recipe says of itself, as one text: a list's parts one after another."""
    return "; ".join(map(str, said)) if isinstance(said, list) else str(said)


def _length(epochs: float | str) -> str:
    """A recipe's length as a person reads it."""
    text = str(epochs)
    if text.endswith("ba"):
        return count(int(text.removesuffix("ba")), "step")
    number = float(text.removesuffix("ep"))
    return f"{number:g} epoch{'' if number == 1 else 's'}"


def main(argv: list[str]) -> int:
    return run_command(recipes, "recipes", argv)
