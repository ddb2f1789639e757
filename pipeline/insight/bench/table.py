"""Plain tables of what was measured."""

from pipeline.insight.bench.arena import Outcome, Spread


def contest_table(outcomes: dict[str, Outcome], what: str, unit: str = "") -> str:
    """A row for each contender: median, least, greatest."""
    width = max(map(len, outcomes))
    lines = []
    for name, outcome in outcomes.items():
        if outcome.absent is not None:
            lines.append(f"  {name:<{width}}  absent: {outcome.absent}")
            continue
        s = Spread.of(getattr(outcome, what))
        lines.append(f"  {name:<{width}}  {s.median:9.3f}   {s.least:9.3f} {s.greatest:9.3f} {unit}".rstrip())
    return "\n".join(lines)


def ratio_line(one: str, other: str, spread: Spread) -> str:
    return f"  {spread.median:6.2f} x  {one} / {other}   ({spread.least:.2f} to {spread.greatest:.2f})"


def rows(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in facts.items())
