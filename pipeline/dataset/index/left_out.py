"""What an index leaves out, counted by reason: nothing that lies in a data root vanishes without a word."""

import errno
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TypedDict

UNREADABLE = "unreadable"
NO_PERMISSION = "without permission"
DEAD_LINKS = "dead links"
FOREIGN = "foreign leftovers"
NO_CLASS = "images beside the class folders"
LOOPS = "links to a folder above"
DEVICES = "pipes or devices"
_IMAGES = (UNREADABLE, NO_PERMISSION, DEAD_LINKS)  # of which a score should know

_NO_PERMISSION = {os.strerror(code) for code in (errno.EACCES, errno.EPERM)}
_NOT_THERE = {os.strerror(code) for code in (errno.ENOENT, errno.ELOOP)}


class Reason(TypedDict):
    """How many, and the path of the first, relative to the data root."""

    count: int
    first: str


LeftOut = Mapping[str, Mapping[str, Reason]]  #: split -> reason -> how many


def by_suffix(name: str) -> str:
    """The reason for a file whose suffix is none of an image."""
    suffix = PurePath(name).suffix.lower()
    return f"with suffix {suffix}" if suffix else "without suffix"


def kind_of(reason: str) -> str:
    """The reason for an image file that could not be read or decoded. reason: what was said of it."""
    if reason in _NO_PERMISSION:
        return NO_PERMISSION
    return DEAD_LINKS if reason in _NOT_THERE else UNREADABLE


@dataclass
class Tally:
    """Counts reasons. `reasons`: reason -> how many."""

    reasons: dict[str, Reason] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        found = self.reasons.setdefault(reason, {"count": 0, "first": path})
        found["count"] += 1

    def __add__(self, other: "Tally") -> "Tally":
        total = {reason: Reason(**found) for reason, found in self.reasons.items()}
        for reason, found in other.reasons.items():
            mine = total.setdefault(reason, {"count": 0, "first": found["first"]})
            mine["count"] += found["count"]
        return Tally(total)


def count_images(left_out: LeftOut, split: str) -> int:
    """Image files of a split that could not be read: those that are missing from a score."""
    return sum(left_out.get(split, {}).get(reason, {"count": 0})["count"] for reason in _IMAGES)


def only_images(left_out: LeftOut) -> LeftOut:
    """The part of it that `count_images` counts."""
    return {split: {reason: n for reason, n in found.items() if reason in _IMAGES} for split, found in left_out.items()}


def without_images(left_out: LeftOut) -> LeftOut:
    """The part of it that `count_images` does not count."""
    return {
        split: {reason: n for reason, n in found.items() if reason not in _IMAGES} for split, found in left_out.items()
    }


def describe(left_out: LeftOut, splits: Iterable[str] | None = None) -> str:
    """ "train: 3 unreadable (train/cat/a.png, ...), 1 foreign leftover (...); val: ..."; empty where all is in."""
    parts = []
    for split in left_out if splits is None else splits:
        reasons = [
            f"{_count(found['count'], reason)} ({found['first']}{', ...' if found['count'] > 1 else ''})"
            for reason, found in left_out.get(split, {}).items()
            if found["count"]
        ]
        if reasons:
            parts.append(f"{split}: {', '.join(reasons)}")
    return "; ".join(parts)


def _count(number: int, reason: str) -> str:
    """ "2 samples without a label", "1 sample without a label"."""
    one = re.sub(r"\b(sample|image|leftover|link|member|pipe|device)s\b", r"\1", reason)
    return f"{number:,} {one if number == 1 else reason}"
