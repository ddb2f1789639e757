"""Line charts as inline SVG, colored by the page's CSS, so that they follow its light and dark. No drawing library."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

POINTS = 200  # drawn of a series; more are averaged
EXACT_POINTS = 1000  # the same of a series whose values are to be seen as they are
COLUMNS = 50  # places of a chart that show their values under the pointer
HOVER_LINES = 8
WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 38


@dataclass(frozen=True)
class Series:
    """A line. color: number of the page's color; faint: of the training, beside the validation's; dashes: how often
    the colors have begun again; exact: not averaged, as evaluations."""

    label: str
    xs: list[float]
    ys: list[float]
    color: int
    faint: bool = False
    dashes: int = 0
    exact: bool = False


def thin(xs: list[float], ys: list[float], most: int = POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means of equal runs; values that are no numbers are left out."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if _is_number(x) and _is_number(y)]
    size = -(-len(pairs) // most) or 1
    runs = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return [sum(x for x, _ in run) / len(run) for run in runs], [sum(y for _, y in run) / len(run) for run in runs]


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `wanted` of them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def highest_drawn(drawn: list[Series]) -> float:
    """Where the y axis ends: at the highest value that is no spike. A spike is above a hundred times what 95 % of the
    values stay below, and above a hundred times the end of each line: a loss of 1e9 would make a flat line of the rest.
    """
    rising = sorted(value for one in drawn for value in one.ys)
    usual = rising[-1 - max(1, len(rising) // 20)] if len(rising) > 1 else rising[-1]
    limit = 100 * max(usual, *(one.ys[-1] for one in drawn))
    return max(value for value in rising if value <= limit) if limit > 0 else rising[-1]


def _dashes(one: Series) -> str:
    """The page's class of a line's dashes; with the colors, 24 kinds of lines."""
    return ("", " dashed", " dotted", " mixed")[one.dashes % 4]


def _label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:,.10g}"


def hover_columns(
    drawn: list[Series], x: Callable[[float], float], y: Callable[[float], float], x_label: str
) -> list[str]:
    """SVG: places over the whole chart, each with the values there. The page's CSS shows those under the pointer, or
    under a finger; no script is needed. x, y: from values to the picture's coordinates."""
    shown = [one for one in drawn if not one.faint] if len(drawn) > HOVER_LINES else drawn
    shown = shown[:HOVER_LINES]
    there = sorted({value for one in shown for value in one.xs})
    number = min(COLUMNS, len(there))
    places = [there[round(i * (len(there) - 1) / max(1, number - 1))] for i in range(number)]
    borders = [LEFT, *((x(a) + x(b)) / 2 for a, b in itertools.pairwise(places)), WIDTH - RIGHT]
    parts = []
    for place, left, right in zip(places, borders, borders[1:], strict=False):
        at = x(place)
        anchor, edge = ("start", at + 6) if at < (LEFT + WIDTH - RIGHT) / 2 else ("end", at - 6)
        lines, dots = [f'<tspan x="{edge:.0f}" dy="14">{escape(x_label)} {place:.4g}</tspan>'], []
        for one in shown:
            here, value = _nearest(one, place)
            where = f" (at {here:.4g})" if abs(x(here) - at) > (WIDTH - LEFT - RIGHT) / COLUMNS else ""
            text = f"{escape(one.label)} {value:.4g}{where}"
            lines.append(f'<tspan class="c{one.color}" x="{edge:.0f}" dy="14">{text}</tspan>')
            dots.append(f'<circle class="c{one.color}" cx="{x(here):.0f}" cy="{y(value):.0f}" r="3.5"/>')
        box = f'y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        line = f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        words = f'<text y="{TOP - 2}" text-anchor="{anchor}">{"".join(lines)}</text>'
        parts.append(f'<g class="at"><rect x="{left:.1f}" {box}/><g class="tip">{line}{"".join(dots)}{words}</g></g>')
    return parts


def _nearest(one: Series, place: float) -> tuple[float, float]:
    """The point of a series, whose xs rise, that is nearest to a place."""
    right = min(bisect.bisect_left(one.xs, place), len(one.xs) - 1)
    left = max(0, right - 1)
    best = left if abs(one.xs[left] - place) <= abs(one.xs[right] - place) else right
    return one.xs[best], one.ys[best]


def line_chart(title: str, series: list[Series], x_label: str, y_label: str, zero: bool = False, note: str = "") -> str:
    """An SVG figure with its legend, or a sentence where there is nothing to draw. zero: the y axis starts at 0. note:
    what the figure says of what is not drawn."""
    drawn = []
    for one in series:
        xs, ys = thin(one.xs, one.ys, EXACT_POINTS if one.exact else POINTS)
        if xs:
            drawn.append(dataclasses.replace(one, xs=xs, ys=ys))
    head = f"<figure><figcaption>{escape(title)}</figcaption>"
    if not drawn:
        return f'{head}<p class="none">{escape(note or "nothing recorded yet")}</p></figure>'
    reached = [value for one in series for value in one.xs if _is_number(value)]  # also where there is nothing to draw
    x_low, x_high = min(reached), max(reached)
    values = [value for one in drawn for value in one.ys]
    y_low, y_high = min(values), highest_drawn(drawn)
    x_low = min(x_low, 0.0)
    y_low = min(y_low, 0.0) if zero else y_low
    y_low, y_high = (y_low - 0.5, y_high + 0.5) if y_low == y_high else (y_low, y_high)
    y_high = max(y_high, *(tick for tick in ticks(y_low, y_high + (y_high - y_low) * 0.18)))
    if max(values) > y_high:  # what is drawn may be averages
        highest = max(value for one in series for value in one.ys if _is_number(value))
        note = (f"{note}; " if note else "") + f"values up to {_label(highest)} are above the chart"
    x_high = x_high if x_high > x_low else x_low + 1.0

    def x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (min(value, y_high) - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">']
    for value in ticks(y_low, y_high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{_label(value)}</text>')
    for value in ticks(x_low, x_high):
        anchor, at = ("end", WIDTH) if x(value) > WIDTH - RIGHT - 12 else ("middle", x(value))
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}">{_label(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for one in sorted(drawn, key=lambda s: not s.faint):
        kind = f"line c{one.color}" + (" faint" if one.faint else "") + _dashes(one)
        if len(one.xs) > 1:
            points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(one.xs, one.ys, strict=True))
            parts.append(f'<polyline class="{kind}" points="{points}"/>')
        if len(one.xs) <= 40:
            for a, b in zip(one.xs, one.ys, strict=True):
                parts.append(f'<circle class="dot c{one.color}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6"/>')
    parts += hover_columns(drawn, x, y, x_label)
    parts.append("</svg>")
    if note:
        parts.append(f'<p class="none">{escape(note)}</p>')
    if len(drawn) == 1:
        return f'{head}<div class="unit">{escape(y_label)}</div>{"".join(parts)}</figure>'
    keys = "".join(
        f'<li class="c{one.color}{" faint" if one.faint else ""}{_dashes(one)}"><i></i>{escape(one.label)}</li>'
        for one in drawn
    )
    return f'{head}<div class="unit">{escape(y_label)}</div>{"".join(parts)}<ul class="legend">{keys}</ul></figure>'
