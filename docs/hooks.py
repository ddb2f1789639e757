"""mkdocs hook: links to files of the repository outside docs/ become plain text with the file's name."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    def plain(link: re.Match[str]) -> str:
        text, target = link[1], link[2].partition("#")[0]
        if not (ROOT / target).exists():  # a broken link: `mkdocs build --strict` reports it
            return link[0]
        return f"`{target}`" if text in (target, Path(target).name) else f"{text} (`{target}`)"

    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", plain, markdown)
