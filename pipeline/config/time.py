"""Time in a recipe: epochs (`90`, "90ep") or batches ("5000ba": optimizer steps)."""

import math

#: a number of epochs, or text with a unit
Time = float | str

REMEDY = 'give epochs (90 or "90ep") or batches ("5000ba")'
_UNITS = ("ep", "ba")


def parse_time(value: Time) -> tuple[float, str]:
    """(number, "ep" or "ba"). Raises ValueError for anything else."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is no time")
    if isinstance(value, int | float):
        return float(value), "ep"
    text = value.strip().lower()
    unit = text[-2:] if text[-2:] in _UNITS else ""
    number = float(text.removesuffix(unit))  # ValueError for what is no number
    if unit == "ba" and number != int(number):
        raise ValueError(f"{value!r} has a part of a batch")
    return number, unit or "ep"


def plain_time(value: Time) -> Time:
    """The one way to write a time: epochs as a number, batches as text. What is no time stays for the checks."""
    try:
        number, unit = parse_time(value)
    except (ValueError, OverflowError, AttributeError):
        return value
    return number if unit == "ep" else f"{int(number)}ba"


def is_time(value: Time, least: float = 0.0, above: bool = False) -> bool:
    """Is it a finite time of at least (or `above`) `least`, whatever its unit?"""
    try:
        number, _ = parse_time(value)
    except (ValueError, OverflowError, AttributeError):
        return False
    return math.isfinite(number) and (number > least if above else number >= least)


def epochs_of(value: Time, steps_per_epoch: float) -> float:
    """A valid time in epochs."""
    number, unit = parse_time(value)
    return number if unit == "ep" else number / steps_per_epoch


def steps_of(value: Time, steps_per_epoch: float) -> float:
    """A valid time in optimizer steps, not rounded."""
    number, unit = parse_time(value)
    return number * steps_per_epoch if unit == "ep" else number
