"""What a verification found: the table, the names, the verdict."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.dataset import imagenet
from pipeline.dataset.index.index import Index
from pipeline.dataset.verify.check import MISSING, NamedSample
from pipeline.dataset.verify.expected import Expected

SHOWN = 10  # names of a kind on the terminal; the JSON file has them all


@dataclass(frozen=True)
class Check:
    """One line of the table. `good` is None where there is nothing to compare with."""

    what: str
    expected: str
    found: str
    good: bool | None


@dataclass
class Report:
    """What was found. `kinds`: sound images by `Finding.kind`; `known`: how many of ImageNet's known oddities."""

    root: Path
    expected: Expected
    index: Index | None
    checks: list[Check] = field(default_factory=list)
    missing: list[NamedSample] = field(default_factory=list)
    damaged: list[NamedSample] = field(default_factory=list)
    unlisted: list[NamedSample] = field(default_factory=list)
    mislabeled: list[NamedSample] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    known: int = 0

    @property
    def good(self) -> bool:
        return all(check.good is not False for check in self.checks)

    @property
    def packed(self) -> bool:
        return self.index is not None and any(split.shards for split in self.index.splits.values())

    def broken(self) -> list[NamedSample]:
        """What fetching again would fix."""
        return self.missing + self.damaged


@dataclass
class SplitCounts:
    """What one split holds: hashes of the ids that are there, and how many sound images each class has."""

    ids: list[int] = field(default_factory=list)
    sound: int = 0
    of_class: Counter = field(default_factory=Counter)


def judge(report: Report, counts_of: dict[str, SplitCounts]) -> None:
    """Fill in the table."""
    expected, checks = report.expected, report.checks
    found_classes = {split: set(counted.of_class) for split, counted in counts_of.items()}
    seen = set().union(*found_classes.values())
    counts, classes = dict(expected.counts), len(expected.synsets)
    if not counts and len(seen) == imagenet.CLASSES and all(map(imagenet.SYNSET.fullmatch, seen)):
        counts, classes = {"train": imagenet.TRAIN_IMAGES, "val": imagenet.VAL_IMAGES}, imagenet.CLASSES
    of_splits: tuple[str, ...] = ("train", "val")
    for split in (name for name in of_splits if name in counts or name in counts_of):
        sound = counts_of.get(split, SplitCounts()).sound
        good = sound == counts[split] if split in counts else None
        checks.append(Check(f"{split} images", f"{counts[split]:,}" if split in counts else "-", f"{sound:,}", good))
    for split, of_split in sorted(found_classes.items()):
        good = of_split == set(expected.synsets) if expected.synsets else (len(of_split) == classes or None)
        checks.append(Check(f"{split} classes", f"{classes:,}" if classes else "-", f"{len(of_split):,}", good))
    alone = found_classes.get("val", set()) - found_classes.get("train", set())
    if alone and "train" in found_classes and not expected.synsets:
        checks.append(Check("val classes that train lacks", "0", f"{len(alone):,} (such as {min(alone)!a})", False))
    if expected.counts.get("val"):
        wanted = Counter(s for s in expected.val_labels.values() if expected.wants("val", s))
        got = counts_of.get("val", SplitCounts()).of_class
        checks.append(Check("val images a class", _span(wanted.values()), _span(got.values()), got == wanted))
    if report.index is not None:
        order = list(expected.synsets) or sorted(report.index.synsets)
        checks.append(Check("class order", "sorted synsets", *_order(list(report.index.synsets), order)))
    if expected.val_labels:
        number = len(report.mislabeled)
        checks.append(Check("val labels that differ from the list", "0", f"{number:,}", number == 0))
    checks.append(Check("missing", "0", f"{len(report.missing):,}", not report.missing))
    checks.append(Check("damaged or unreadable", "0", f"{len(report.damaged):,}", not report.damaged))
    if expected.counts:
        checks.append(Check("in no list", "0", f"{len(report.unlisted):,}", not report.unlisted))
    names = (("png", "PNG"), ("cmyk", "CMYK"), ("grayscale", "grayscale"), ("other", "of other formats"))
    odd = [f"{report.kinds[kind]:,} {name}" for kind, name in names if report.kinds[kind]]
    checks.append(Check("unusual, but fine", "-", ", ".join(odd) or "none", None))
    if expected.is_imagenet or report.known:
        known = len(imagenet.KNOWN_PNG) + len(imagenet.KNOWN_CMYK)
        checks.append(Check("ImageNet's known PNG and CMYK files", f"{known}", f"{report.known}", None))


def _span(values: Iterable[int]) -> str:
    counts = list(values) or [0]
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _order(found: list[str], wanted: list[str]) -> tuple[str, bool]:
    return ("the same", True) if found == wanted else ("another", False)


def format_table(checks: list[Check]) -> str:
    """The checks as aligned columns."""
    rows = [("", "expected", "found", "")]
    verdict = {True: "ok", False: "WRONG", None: ""}
    rows += [(check.what, check.expected, check.found, verdict[check.good]) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows
    )


def describe(report: Report) -> str:
    """The last line: the verdict."""
    expected = report.expected
    if not report.good:
        return f"{report.root}: NOT complete"
    if expected.is_imagenet:
        return f"{report.root}: complete and verified: ImageNet (ILSVRC 2012), every image"
    if expected.counts:
        return f"{report.root}: complete and verified: every image that its lists name"
    return f"{report.root}: unchanged and readable; there is no list to check completeness against"


def to_json(report: Report) -> dict:
    """Everything in the report, by name."""

    def rows(named: list[NamedSample]) -> list[dict]:
        return [{"split": n.split, "file": n.name, "class": n.synset, "problem": n.problem} for n in named]

    return {
        "root": str(report.root),
        "good": report.good,
        "verdict": describe(report),
        "fingerprint": report.index.fingerprint if report.index else None,
        "checks": [vars(check) for check in report.checks],
        "missing": rows(report.missing),
        "damaged": rows(report.damaged),
        "unlisted": rows(report.unlisted),
        "mislabeled": rows(report.mislabeled),
        "oddities": {kind: number for kind, number in report.kinds.items() if kind},
    }


def show(report: Report) -> None:
    """Print the table, the first names of each kind, and the verdict."""
    print(format_table(report.checks))
    for title in ("missing", "damaged", "unlisted", "mislabeled"):
        named = getattr(report, title)
        for one in named[:SHOWN]:
            about = "" if one.problem in ("", MISSING) else f": {one.problem}"
            print(f"{title}: {one.name}{about}")
        if len(named) > SHOWN:
            print(f"{title}: ... and {len(named) - SHOWN:,} more (all with --json FILE)")
    if report.damaged and report.index is not None and not report.packed and not report.expected.counts:
        print(f"if images were changed on purpose, run: pipeline index {report.root}")
    print(describe(report))
