"""The recipes: one YAML a result, with its source, published and measured figures; and the verb that lists them."""

import itertools
import shutil
import statistics
import textwrap
from pathlib import Path

import yaml

from pipeline.command import run_command

NOT_IMAGENET = ("cifar10-", "smoke")  # beginnings of names
_AT_ONCE = 16  # images: enough for the weights' share of the traffic to be small


def recipes(card: str | None = None) -> None:
    """List the recipes that come with the package.

    Args:
        card: a GPU (h100, a100-80gb, ...): also the hours of it that each ImageNet recipe takes at least, by its
            roofline (see `pipeline estimate`).
    """
    from pipeline.config import recipe_names, recipes_folder

    if card is not None:
        from pipeline.insight.estimate.gpus import find_card

        find_card(card)  # is it known?
    hours: dict[tuple, float] = {}
    width = max(map(len, recipe_names()))
    columns = min(shutil.get_terminal_size((120, 24)).columns, 120)
    for name in recipe_names():
        written = yaml.safe_load((recipes_folder() / f"{name}.yaml").read_text())
        about = written.get("about", {})
        said = [about.get("what", "")]
        facts = [f"{_length(written['schedule']['epochs'])}, batch {written['train']['global_batch_size']:,}"]
        if card is not None and not name.startswith(NOT_IMAGENET):
            facts.append(f"at least {_gpu_hours(name, card, hours):,.0f} GPU-hours on {card}")
        said.append("; ".join(facts))
        said += [
            f"{key}: {about[key]}" for key in ("published", "goal", "measured", "differs", "missing") if key in about
        ]
        lines = [line for text in said for line in textwrap.wrap(text, max(40, columns - width - 1)) or [""]]
        for label, line in zip(itertools.chain([name], itertools.repeat("")), lines, strict=False):
            print(f"{label:{width}} {line}".rstrip(), flush=True)


def _length(epochs: float | str) -> str:
    """A recipe's length in words."""
    text = str(epochs)
    if text.endswith("ba"):
        return f"{int(text.removesuffix('ba')):,} steps"
    number = float(text.removesuffix("ep"))
    return f"{number:g} epoch{'' if number == 1 else 's'}"


def _gpu_hours(name: str, card: str, known: dict[tuple, float]) -> float:
    """The least hours of a card that training takes on ImageNet, all GPUs together; evaluation is not in it.

    known: seconds an image of what was traced before, which this adds to.
    """
    from pipeline.config import load_config, resolve_recipe
    from pipeline.config.time import epochs_of
    from pipeline.insight.estimate.cli import IMAGENET
    from pipeline.insight.estimate.gpus import find_card
    from pipeline.insight.estimate.memory import Tracer

    config = load_config(Path(resolve_recipe(name)), verb="recipes")
    model, precision = config.model, config.train.precision
    key = model.name, model.blurpool, precision, config.data.image_size
    if key not in known:
        peak = find_card(card)
        step = Tracer(config, IMAGENET[1]).trace(_AT_ONCE)
        known[key] = step.seconds(peak.half_tflops, peak.tflops, peak.gb_s) / step.images
    images, batch = IMAGENET[0], config.train.global_batch_size
    epochs = epochs_of(config.schedule.epochs, images / batch)
    sizes = [(config.data.size_at(epoch) / config.data.image_size) ** 2 for epoch in range(max(1, round(epochs)))]
    return known[key] * images * epochs * statistics.fmean(sizes) / 3600


def main(argv: list[str]) -> int:
    return run_command(recipes, "recipes", argv)
