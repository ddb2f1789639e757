"""The page of `qualify`: a table for each part, what failed first."""

from html import escape

from pipeline.insight.report.page import facts, page, table


def render(content: dict) -> str:
    """The HTML document of what is in qualify.json."""
    title = f"{content['node']}: {'not qualified' if content['failed'] else 'qualified'}"
    body = [f"<h1>{escape(title)}</h1>"]
    device = f"{content['gpus']} GPUs" if content["device"] == "cuda" else "CPU"
    body.append(
        facts([("device", device), ("failed", str(content["failed"])), ("seconds", f"{content['seconds']:,.0f}")])
    )
    body.append(f"<p class=soft>{escape(content['time'])}</p>")
    failed = [
        [name, row["what"], row["value"], row["bound"]]
        for name, rows in content["parts"].items()
        for row in rows
        if row["verdict"] == "FAIL"
    ]
    if failed:
        body += ["<h2>Failed</h2>", table(["part", "what", "found", "must be"], failed)]
    for name, rows in content["parts"].items():
        cells = [[row["verdict"], row["what"], row["value"], row["bound"]] for row in rows]
        body += [f"<h2>{escape(name)}</h2>", table(["", "what", "found", "must be"], cells)]
    return page(title, body)
