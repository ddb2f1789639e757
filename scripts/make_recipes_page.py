"""Write what docs/recipes.md takes from the recipes: the picture of their learning rates, and how each differs from its
source.

Usage: python scripts/make_recipes_page.py

The picture, docs/images/learning_rates.svg: for each recipe with a source its rate over the run, and its first ten
epochs enlarged. Dashed: computed from the source's formula (tests/source_rates.py). Solid: from the recipe's file.
"""

import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from source_rates import IMAGES, RATES  # noqa: E402

from pipeline.config import parse_config, recipe_names  # noqa: E402
from pipeline.training.optim.lr_schedule import Schedule, peak_lr  # noqa: E402

PAGE, PICTURE = ROOT / "docs/recipes.md", ROOT / "docs/images/learning_rates.svg"
BEGIN, END = "<!-- written by scripts/make_recipes_page.py -->\n", "<!-- end -->\n"
COLUMNS, WIDTH, HEIGHT = 3, 300, 150  # pixels of a recipe's panel
LEFT, GAP, RIGHT, TOP, BOTTOM = 44, 14, 8, 26, 30
NEAR = 10  # epochs of the enlarged beginning
SHARE = 0.4  # of a panel's width, for the beginning
SOURCE, OURS = "#d1570a", "#1f6feb"

Points = list[tuple[float, float]]


def panel(name: str, left: int, top: int) -> list[str]:
    """One recipe: its beginning and its whole run, of the source and ours."""
    config = parse_config(["--config", name])
    per_epoch = IMAGES / config.train.global_batch_size
    peak = peak_lr(config.optim, config.train.global_batch_size)
    schedule = Schedule(config.schedule, peak, per_epoch)
    whole = schedule.total_steps / per_epoch
    room = WIDTH - LEFT - GAP - RIGHT
    floor, height = top + HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    parts = [f'<text x="{left + LEFT}" y="{top + 16}" font-weight="bold">{name}</text>']
    for value in (0, peak):
        y = floor - height * value / peak
        parts.append(f'<path d="M{left + LEFT} {y:.0f}H{left + WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left + LEFT - 5}" y="{y + 4:.0f}" text-anchor="end" fill="#555">{value:g}</text>')
    begin = left + LEFT, SHARE * room, min(NEAR, whole)
    run = left + LEFT + SHARE * room + GAP, (1 - SHARE) * room, whole
    for start, width, epochs in (begin, run):
        count = min(schedule.total_steps, int(epochs * per_epoch))
        steps = sorted({min(round(i * count / 400), count - 1) for i in range(401)})
        expected = [RATES[name](s / per_epoch, math.floor(s / per_epoch + 1e-9)) for s in steps]
        rates = (
            (SOURCE, 3.6, ' stroke-dasharray="5 4"', expected),
            (OURS, 1.3, "", [schedule.lr(s) for s in steps]),
        )
        for color, thick, dashes, values in rates:
            points = [
                (start + width * s / per_epoch / epochs, floor - height * value / peak)
                for s, value in zip(steps, values, strict=True)
            ]
            parts.append(f'<path d="{path(points)}" fill="none" stroke="{color}" stroke-width="{thick}"{dashes}/>')
        for epoch, anchor, x in ((0, "start", start), (epochs, "end", start + width)):
            parts.append(f'<text x="{x:.0f}" y="{floor + 14}" text-anchor="{anchor}" fill="#555">{epoch:.4g}</text>')
    return parts


def path(points: Points) -> str:
    """An SVG path through the points, without those that lie on a straight line to within a twentieth of a pixel."""
    kept, last = [points[0]], 0
    for i in range(2, len(points)):
        if not is_straight(points[last : i + 1]):
            last = i - 1
            kept.append(points[last])
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (*kept, points[-1]))


def is_straight(points: Points) -> bool:
    (x0, y0), (x1, y1) = points[0], points[-1]
    return all(abs(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - y) < 0.05 for x, y in points[1:-1])


def picture() -> str:
    rows = -(-len(RATES) // COLUMNS)
    width, height = COLUMNS * WIDTH, 44 + rows * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" role="img">',
        "<title>Learning rates of the recipes and of their sources</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="13" font-weight="bold">Learning rate against epochs: '
        f'<tspan fill="{SOURCE}">the source, dashed</tspan>, <tspan fill="{OURS}">ours, solid</tspan>. '
        f"Left: the first {NEAR} epochs; right: the whole run</text>",
    ]
    for i, name in enumerate(RATES):
        parts += panel(name, i % COLUMNS * WIDTH, 36 + i // COLUMNS * HEIGHT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def differences() -> str:
    """A line a recipe, from its `about` alone."""
    lines = []
    for name in recipe_names():
        about = parse_config(["--config", name]).about
        said = about.get("differs")
        if isinstance(said, list):
            lines.append(f"- `{name}` differs from its source in: {'; '.join(map(str, said))}.\n")
        else:
            lines.append(f"- `{name}`: {about['source']}.\n")
    return "".join(lines)


def page(text: str) -> str:
    """The page with its list written again."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + differences() + END + rest.split(END)[1]


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
