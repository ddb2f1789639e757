"""What a part of `qualify` is given, and the rows that it gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["pass", "FAIL", "info", "skipped"]


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        what: in words.
        value: what was found, with its unit.
        bound: what it must be; empty: it is only reported.
        verdict: "info" where there is no bound, "skipped" where it can't be found out here.
        rate: a speed, where it is one: what preflight compares between nodes.
    """

    what: str
    value: str
    bound: str = ""
    verdict: Verdict = "info"
    rate: float | None = None


@dataclass(frozen=True)
class Settings:
    """device: "cuda" or "cpu". gpus: how many. root: a data set with an index, or empty. scratch: a folder for files.
    seconds: that the part may take."""

    device: str
    gpus: int
    root: str
    scratch: Path
    seconds: float


def judged(what: str, value: str, bound: str, good: bool, rate: float | None = None) -> Row:
    """A row with a bound."""
    return Row(what, value, bound, "pass" if good else "FAIL", rate)


def skipped(what: str, why: str) -> Row:
    """A row of what can't be found out here."""
    return Row(what, why, "", "skipped")
