"""One self-contained HTML page: nothing is loaded from a network, no script runs, and data is escaped."""

import base64
from collections.abc import Collection
from html import escape
from io import BytesIO

import numpy as np

from pipeline.redact import redact

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c2024; --soft: #60646c; --rule: #dcdee2; --card: #ffffff;
  --c0: #2563c9; --c1: #c2410c; --c2: #15803d; --c3: #7c3aed; --c4: #b4860b; --c5: #be185d; --bar: #d7e3f7; }
@media (prefers-color-scheme: dark) { :root { --paper: #131517; --ink: #e8e9ea; --soft: #9ba1a9; --rule: #33383e;
  --card: #1b1e21; --c0: #7aa7f7; --c1: #f2935c; --c2: #6bcf8f; --c3: #b79bf5; --c4: #e3bd54; --c5: #f084b1;
  --bar: #2a3d5e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .3rem 0 .8rem; } .soft, .none, .unit { color: var(--soft); font-size: .875rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1rem 0 0; padding: 0; list-style: none; }
.facts b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .875rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-weight: 600; font-size: .95rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .faint { opacity: .55; }
.line.faint { stroke-width: 1.4; } .line.dashed { stroke-dasharray: 7 4; }
.line.dotted { stroke-dasharray: 2 3; } .line.mixed { stroke-dasharray: 9 3 2 3; }
.legend .dashed i { mask: repeating-linear-gradient(90deg, #000 0 4px, transparent 4px 7px); }
.legend .dotted i { mask: repeating-linear-gradient(90deg, #000 0 2px, transparent 2px 4px); }
.legend .mixed i { mask: repeating-linear-gradient(90deg, #000 0 6px, transparent 6px 8px, #000 8px 10px,
  transparent 10px 12px); }
.line.c0 { stroke: var(--c0); } .line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .line.c4 { stroke: var(--c4); } .line.c5 { stroke: var(--c5); }
.dot.c0, .legend .c0 i { fill: var(--c0); background: var(--c0); } .dot.c1, .legend .c1 i { fill: var(--c1);
  background: var(--c1); } .dot.c2, .legend .c2 i { fill: var(--c2); background: var(--c2); }
.dot.c3, .legend .c3 i { fill: var(--c3); background: var(--c3); } .dot.c4, .legend .c4 i { fill: var(--c4);
  background: var(--c4); } .dot.c5, .legend .c5 i { fill: var(--c5); background: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .3rem 0 0; padding: 0; list-style: none;
  font-size: .875rem; } .legend i { display: inline-block; width: .9rem; height: .2rem; margin-right: .4rem;
  vertical-align: middle; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.pictures img { width: 100%; display: block; image-rendering: pixelated; }
.pictures div { font-size: .875rem; color: var(--soft); max-width: 26rem; }
.shots { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .8rem; }
.shots img { width: 100%; display: block; border-radius: 4px; } .shots div { font-size: .8125rem; line-height: 1.35; }
.shots.pairs { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 3px; margin-bottom: .2rem; }
.wide { overflow-x: auto; overflow-wrap: normal; } .wide .n { white-space: nowrap; }
 table { border-collapse: collapse; font-size: .875rem; }
th { text-align: left; font-weight: 600; color: var(--soft); } th, td { padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--rule); vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
td.bar { min-width: 9rem; } td.bar i { display: block; height: .8rem; margin-top: .3rem; background: var(--c0);
  border-radius: 2px; min-width: 1px; }
.at rect { fill: none; pointer-events: all; cursor: crosshair; } .tip { visibility: hidden; pointer-events: none; }
.at:hover .tip { visibility: visible; } .tip .axis { stroke-dasharray: 3 3; }
svg .tip text { fill: var(--ink); font-size: 12px; paint-order: stroke; stroke: var(--card); stroke-width: 5px;
  stroke-linejoin: round; }
.tip .c0 { fill: var(--c0); } .tip .c1 { fill: var(--c1); } .tip .c2 { fill: var(--c2); } .tip .c3 { fill: var(--c3); }
.tip .c4 { fill: var(--c4); } .tip .c5 { fill: var(--c5); }
a { color: var(--c0); }
@media (max-width: 30rem) { body { padding-top: .8rem; } h1 { font-size: 1.25rem; }
  .facts { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 1rem; margin-top: .5rem; }
  .facts b { font-size: 1.2rem; line-height: 1.3; } figure { padding: .6rem .5rem; } }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--c0); }
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: list[str]) -> str:
    """The whole document, without credentials. title: plain text; body: HTML."""
    return redact(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def facts(items: list[tuple[str, str]]) -> str:
    """[(label, value)] as a row of large figures."""
    return (
        '<ul class="facts">'
        + "".join(f"<li><b>{escape(v)}</b><span>{escape(k)}</span></li>" for k, v in items)
        + "</ul>"
    )


def table(head: list[str], rows: list[list], numeric: Collection[int] = ()) -> str:
    """Plain values, escaped; the columns in `numeric` are aligned to the right; a `Bar` is drawn."""

    def cell(column: int, value: object, tag: str) -> str:
        if isinstance(value, Bar):
            return f'<td class="bar"><i style="width:{max(0.0, min(100.0, value.percent)):.1f}%"></i></td>'
        return f"<{tag}{' class=n' if column in numeric else ''}>{escape(str(value))}</{tag}>"

    lines = ["<tr>" + "".join(cell(i, name, "th") for i, name in enumerate(head)) + "</tr>"]
    lines += ["<tr>" + "".join(cell(i, value, "td") for i, value in enumerate(row)) + "</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


class Bar(float):
    """A percentage that is drawn as a bar."""

    @property
    def percent(self) -> float:
        return float(self)


def fold(summary: str, inside: str) -> str:
    """Long content, folded behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def encode(picture: np.ndarray, kind: str = "PNG") -> bytes:
    """uint8 [h, w, 3] as a PNG or JPEG file."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(picture).save(file, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return file.getvalue()


def image(picture: np.ndarray, about: str, kind: str = "PNG") -> str:
    """A picture inside the page. about: its alternative text."""
    data = base64.b64encode(encode(picture, kind)).decode()
    return f'<img src="data:image/{kind.lower()};base64,{data}" alt="{escape(about, quote=True)}">'
