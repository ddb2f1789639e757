"""Write docs/options.md, the page of all options of `pipeline train`, and the table in docs/resume.md of those that may
change, from the configuration's dataclasses."""

import dataclasses
import re
import typing
from pathlib import Path

from docstring_parser import parse_from_object

from pipeline.config.run import RawConfig

RESUME = Path(__file__).resolve().parents[1] / "docs/resume.md"
BEGIN, END = "<!-- options that may change: written by scripts/make_options_page.py -->\n\n", "\n<!-- end -->"
PAGE = Path(__file__).resolve().parents[1] / "docs/options.md"

HEAD = """# Options

<!-- Written by scripts/make_options_page.py from pipeline/config: do not edit. -->

Every option of `pipeline train`, with its default. Give options on the command line (`--optim.lr 0.4`), or in a YAML
file (`optim: {lr: 0.4}`) with `--config FILE`. A command line overrides the file. `--print_config` prints the
result. `preflight`, `estimate` and `bench train` take the same options.

Options marked "may change" can be changed when a run resumes. All others belong to the recipe: a run folder with
other values is refused.
"""


def type_name(kind: object) -> str:
    """A type as a reader writes it: `int`, `auto | dali`, `list of 3 float`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " | ".join(map(str, parts))
    if origin is tuple:
        return f"list of {'' if parts[-1] is ... else f'{len(parts)} '}{type_name(parts[0])}"
    if dict in (kind, origin):
        return "mapping"
    if parts:
        return " | ".join(dict.fromkeys(type_name(part) for part in parts))
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")


def rows(group: type, prefix: str) -> list[str]:
    """One line of a Markdown table for each option of a group."""
    about = {param.arg_name: param.description or "" for param in parse_from_object(group).params}
    kinds = typing.get_type_hints(group)
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for item in dataclasses.fields(group):
        if dataclasses.is_dataclass(item.type):
            continue
        default = item.default if item.default is not dataclasses.MISSING else {}
        shown = {None: "none", "": "none"}.get(default, str(default)) if not isinstance(default, dict) else "empty"
        text = cell(about.get(item.name, ""))
        if not item.metadata.get("semantic", True):
            text += " (may change)"
        lines.append(
            f"| `--{prefix}{item.name}` | {cell(type_name(kinds[item.name]))} | {cell(shown)} | {text.strip()} |"
        )
    return lines


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## The run\n", *rows(RawConfig, "")]
    for group in dataclasses.fields(RawConfig):
        if dataclasses.is_dataclass(group.type):
            title = cell((group.type.__doc__ or "").split("\n\n")[0])
            parts += ["", f"## {group.name}", "", title, "", *rows(typing.cast(type, group.type), f"{group.name}.")]
    return "\n".join(parts) + "\n"


def changeable(group: type = RawConfig, prefix: str = "") -> list[str]:
    """One line of a Markdown table for each option that may change when a run resumes."""
    about = {param.arg_name: param.description or "" for param in parse_from_object(group).params}
    lines = []
    for item in dataclasses.fields(group):
        if dataclasses.is_dataclass(item.type):
            lines += changeable(typing.cast(type, item.type), f"{prefix}{item.name}.")
        elif not item.metadata.get("semantic", True) and item.name != "about":
            lines.append(f"| `--{prefix}{item.name}` | {cell(about.get(item.name, ''))} |")
    return lines


def resume_page(text: str) -> str:
    """docs/resume.md with its table written again."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "\n".join(["| option | meaning |", "|---|---|", *changeable()]) + "\n" + END + tail


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    RESUME.write_text(resume_page(RESUME.read_text(encoding="utf-8")), encoding="utf-8")
