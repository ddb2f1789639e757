"""What the groups of knobs are made of: free fields, and checks of their values."""

import math
from dataclasses import field
from typing import Any

#: a knob's name, its value, whether that is possible, and what to give instead
Check = tuple[str, Any, bool, str]


def runtime_field(default: Any) -> Any:
    """A field that does not define the run: how it is carried out may change when it resumes."""
    return field(default=default, metadata={"semantic": False})


def positive(name: str, value: float | None, optional: bool = False) -> Check:
    good = (value is None and optional) or (value is not None and 0 < value < math.inf)
    return name, value, good, "give a number above 0"


def at_most(name: str, value: int | None, most: int, reason: str, optional: bool = False) -> Check:
    """A count from 1 to `most`. reason: why more is of no use."""
    good = (value is None and optional) or (value is not None and 0 < value <= most)
    return name, value, good, f"give a number above 0, at most {most:,} ({reason})"


def at_least_zero(name: str, value: float) -> Check:
    return name, value, 0 <= value < math.inf, "give a number of 0 or more"


def share(name: str, value: float) -> Check:
    return name, value, 0 <= value <= 1, "give a number from 0 to 1"


def below_one(name: str, value: float) -> Check:
    return name, value, 0 <= value < 1, "give a number from 0 to below 1"
