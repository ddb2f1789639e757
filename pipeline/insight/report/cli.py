"""The verb `report`: a run, or several side by side, as one self-contained HTML page, also while they train."""

import dataclasses
import math
import os
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import numpy as np

from pipeline.command import run_command
from pipeline.config.train import Precision
from pipeline.counts import count
from pipeline.errors import EXIT_OK, UserError
from pipeline.insight.recipes import as_text
from pipeline.insight.report import page
from pipeline.insight.report.charts import Series, line_chart
from pipeline.insight.report.network_page import network_sections
from pipeline.insight.runs import distinct_names, read_each
from pipeline.insight.status.run_state import read_state
from pipeline.progress import duration
from pipeline.tracking.eval_rows import better_scores, left_out_note
from pipeline.tracking.ledger_rows import is_start, world_sizes, world_sizes_in_words

if TYPE_CHECKING:
    from pipeline.insight.report.run_record import Record

COLORS = 6  # of the page


def charts(records: list["Record"]) -> str:
    """Loss and accuracy against epochs and hours, learning rate, speed. One run: training and validation in two
    colors; several: a color each."""
    alone = len(records) == 1
    drawn = []
    progress, column = progress_of(records)
    longest = max((record.hours[-1] for record in records if record.hours), default=1.0)
    unit_of_time, per_hour = ("hours", 1) if longest >= 1 else ("minutes", 60)
    losses = {record.config.optim.loss for record in records} - {"ce"}
    unit = "training: the run's loss (of another scale); validation: cross-entropy" if losses else "cross-entropy"
    pairs = [("Loss", "loss", "val_loss", unit), ("Accuracy", "top1", "val_top1", "top-1, percent")]
    for title, train, val, unit in pairs:
        note = not_drawn(sum(record.lost(train) + record.lost(val, "eval") for record in records))
        for against in (progress, f"{unit_of_time} of training"):
            series = []
            for number, record in enumerate(records):
                name = "" if alone else f"{record.name}: "
                color, dashes = number % COLORS, number // COLORS
                x = record.column(column) if against == progress else [hours * per_hour for hours in record.hours]
                x_eval = (
                    record.column(column, "eval")
                    if against == progress
                    else [hours * per_hour for hours in record.eval_hours()]
                )
                series.append(Series(f"{name}training", x, record.column(train), color, True, dashes))
                validation = record.column(val, "eval")
                shade = 1 if alone else color
                series.append(Series(f"{name}validation", x_eval, validation, shade, dashes=dashes, exact=True))
                if alone and any(row.get(f"val_ema_{train}") is not None for row in record.evals):
                    averaged = record.column(f"val_ema_{train}", "eval")
                    series.append(Series("validation, averaged weights", x_eval, averaged, 3, exact=True))
                if alone and val == "val_top1":
                    top5 = record.column("val_top5", "eval")
                    series.append(Series("validation, top-5", x_eval, top5, 2, exact=True))
            drawn.append(line_chart(f"{title} against {against}", series, against, unit, zero=True, note=note))
    for title, shown, unit, factor in (
        ("Learning rate", "lr", "", 1),
        ("Speed", "images_per_s", "images/s", 1),
        ("Waiting for data", "data_wait_fraction", "percent of the step", 100),
        ("Gradient", "grad_norm", "norm", 1),
    ):
        series = [
            Series(
                record.name,
                record.column(column),
                [factor * y for y in record.column(shown)],
                number % COLORS,
                dashes=number // COLORS,
            )
            for number, record in enumerate(records)
        ]
        note = not_drawn(sum(record.lost(shown) for record in records))
        drawn.append(line_chart(title, series, progress, unit, zero=True, note=note))
    return f'<div class="charts">{"".join(drawn)}</div>'


def not_drawn(lost: int) -> str:
    """What a chart says of values that are no numbers."""
    return f"{count(lost, 'value')} NaN or infinite, not drawn" if lost else ""


def progress_of(records: list["Record"]) -> tuple[str, str]:
    """What curves are drawn against, and the ledger's column: epochs, or steps where no run has come to an epoch."""
    longest = max((record.train[-1].get("epoch", 1.0) for record in records if record.train), default=1.0)
    return ("steps", "step") if longest < 1 else ("epochs", "epoch")


def rows_section(record: "Record", page_folder: Path) -> str:
    """Every evaluation, and where all rows are."""
    place = os.path.relpath(record.folder.ledger, page_folder)
    link = f'<a href="{escape(quote(place), quote=True)}">{escape(record.folder.ledger.name)}</a>'
    text = f'<p class="soft">Point at a curve, or tap it, to see its values. Every row of the ledger: {link}</p>'
    columns = ("step", "epoch", "val_loss", "val_top1", "val_top5", "val_ema_top1", "images")
    names = [name for name in columns if any(name in row for row in record.evals)]
    rows = [[_rounded(row.get(name, "")) for name in names] for row in reversed(record.evals)]
    many = f"All {len(rows):,} evaluations, the last first" if len(rows) > 1 else "The evaluation"
    return text + (page.fold(many, page.table(names, rows, set(range(len(names))))) if rows else "")


def _rounded(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def headline(record: "Record") -> str:
    """The large figures: the result, the state and the last evaluation first."""
    state, last = read_state(record.folder.path), record.evals[-1] if record.evals else None
    best = better_scores(record.best) if record.best else None
    averaged = ", averaged weights" if best and best["averaged"] else ""
    items = [
        (f"top-1, best{averaged}{left_out_note(record.best or {})}", f"{best['top1']:.2f} %" if best else "not yet"),
        (f"state{f' ({state.detail})' if state.detail else ''}", state.state),
        (
            f"last evaluation, epoch {last.get('epoch', math.nan):.4g}" if last else "last evaluation",
            f"{better_scores(last)['top1']:.2f} %" if last else "not yet",
        ),
        ("top-5 there", f"{best['top5']:.2f} %" if best else "not yet"),
        ("epochs done", f"{record.train[-1].get('epoch', math.nan):.2f}" if record.train else "0"),
        ("steps done", f"{record.train[-1]['step']:,}" if record.train else "0"),
        ("training", duration(3600 * record.hours[-1]) if record.hours else "none"),
    ]
    return page.facts(items)


def history(record: "Record") -> str:
    """Starts, interruptions and ends; on what hardware."""
    rows = []
    for event in record.events:
        when = event.get("time")
        stamp = time.strftime("%Y-%m-%d %H:%M", time.gmtime(when)) if isinstance(when, float | int) else ""
        known = ("kind", "event", "step", "time", "host", "world_size", "hardware")
        rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in known)
        where = f"{event.get('world_size', '')} {event.get('hardware', '')}".strip()
        rows.append([stamp, event.get("event", ""), event.get("step", ""), event.get("host", ""), where, rest])
    starts = sum(is_start(event) for event in record.events)
    text = f"Started {count(starts, 'time')}." if starts else "Not started yet."
    if sizes := world_sizes_in_words(world_sizes(filter(is_start, record.events))):
        text += f" Processes: {sizes}."
    return f"<p>{text}</p>" + page.table(["UTC", "what", "step", "host", "processes", "more"], rows, {2})


def settings(record: "Record") -> str:
    about = [[key, as_text(value)] for key, value in record.config.about.items()]
    inside = page.table(["setting", "value"], [[key, value] for key, value in record.settings.items()])
    return (page.table(["recipe", ""], about) if about else "") + page.fold("All settings", inside)


def comparison(records: list["Record"]) -> str:
    """The settings that differ, and results side by side."""
    rows = []
    for record in records:
        best, done = record.best, record.train[-1] if record.train else {}
        better = better_scores(best) if best else {}
        scores = (
            [f"{better['top1']:.2f}", f"{better['top5']:.2f}", f"{best.get('epoch', math.nan):.2f}"]
            if best
            else ["", "", ""]
        )
        scores[0] += left_out_note(best or {})
        hours = duration(3600 * record.hours[-1]) if record.hours else ""
        rows.append([record.name, *scores, f"{done.get('epoch', 0):.2f}", hours])
    head = ["run", "top-1 %", "top-5 %", "at epoch", "epochs done", "training"]
    text = page.table(head, rows, {1, 2, 3, 4, 5})
    keys = sorted(set().union(*(record.settings for record in records)))
    missing = object()
    differing = [key for key in keys if len({str(record.settings.get(key, missing)) for record in records}) > 1]
    if not differing:
        return f"<p>All settings are the same.</p>{text}"
    lines = [[key, *(record.settings.get(key, "") for record in records)] for key in differing]
    settings_table = page.table(["setting", *(r.name for r in records)], lines)
    return f"<h2>Settings that differ</h2>{settings_table}<h2>Results</h2>{text}"


def write_report(
    runs: list[str],
    out: Path | None,
    data_root: str | None,
    device: str,
    most: int | None,
    index: str | None = None,
    precision: Precision | None = None,
) -> Path:
    """Write the page and return its place. runs: folders, or folders of runs. Raises UserError for one that is no run,
    or where the page can't be written."""
    from pipeline.insight.report.run_record import read_record

    records = list(read_each(runs, lambda run: read_record(str(run)), "shown").values())
    names = distinct_names([record.folder.path for record in records])
    records = [dataclasses.replace(record, name=name) for record, name in zip(records, names, strict=True)]
    folder = records[0].folder.report
    target = out or folder / ("index.html" if len(records) == 1 else "compare.html")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if len(records) == 1:
            record = records[0]
            pictures = target.parent / "pictures"
            pictures.mkdir(exist_ok=True)

            def save(name: str, picture: np.ndarray) -> None:
                (pictures / f"{name}.png").write_bytes(page.encode(picture))

            title = f"{record.name}: {record.config.model.name}"
            body = [f"<h1>{escape(title)}</h1>", headline(record), f'<p class="soft">{escape(describe(record))}</p>']
            body += ["<h2>Training</h2>", charts(records), rows_section(record, target.parent)]
            body += network_sections(record, data_root, device, most, save, index, precision)
            body += ["<h2>Settings</h2>", settings(record), "<h2>Hardware and starts</h2>", history(record)]
        else:
            title = " against ".join(record.name for record in records[:3])
            title += f" and {len(records) - 3} more" if len(records) > 3 else ""
            body = [f"<h1>{escape(title)}</h1>", comparison(records), "<h2>Training</h2>", charts(records)]
            for record in records:
                body += [f"<h2>{escape(record.name)}</h2>", f'<p class="soft">{escape(describe(record))}</p>']
                body += [rows_section(record, target.parent), settings(record), history(record)]
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.write_text(page.page(title, body), encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{target} can't be written ({error.strerror}); give another --out") from error
    return target


def describe(record: "Record") -> str:
    """A sentence about the recipe."""
    config = record.config
    what = config.about.get("what")
    sizes = f"{config.data.image_size} px, global batch {config.train.global_batch_size}, {config.train.precision}"
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"{f'{what}. ' if what else ''}{sizes}. Written {made}."


def report(
    runs: list[str],
    out: str | None = None,
    data_root: str | None = None,
    index: str | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    images: int | None = None,
    precision: Precision | None = None,
) -> int:
    """One self-contained page of a run, or of several side by side.

    Args:
        runs: run folders, or folders of runs.
        out: file to write; default: RUN/report/index.html (several: compare.html).
        data_root: the data set's folder now; default: the run's.
        index: folder of its index; default: the run's, or DATA_ROOT/index.
        device: device for the predictions.
        images: validation images to classify; default: all with CUDA, otherwise 1,000.
        precision: of the network's arithmetic for the predictions; default: as in the run.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: no GPU is here; give --device cpu")
    if images is not None and images < 1:
        raise UserError(f"--images {images}: give a number above 0")
    if data_root is not None and not Path(data_root).expanduser().is_dir():
        raise UserError(f"--data_root {data_root} is not a folder; give the one that holds train/ and val/")
    to = Path(out).expanduser() if out else None
    if to is not None and to.suffix.lower() not in (".html", ".htm"):  # not over a ledger, say
        raise UserError(f"--out {out}: give a file that ends in .html")
    print(write_report(runs, to, data_root, device, images, index, precision))
    return EXIT_OK


def main(argv: list[str]) -> int:
    return run_command(report, "report", argv)
