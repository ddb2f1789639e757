"""The part of ImageNet that a data root was asked to hold, by the file that `fetch` or `pack` left in it."""

import json
from pathlib import Path

from pipeline.dataset.index.index import PACKED
from pipeline.errors import UserError

MANIFEST = "fetch.json"  #: written by `fetch`; `pack` copies its selection into `pack.json`


def read_selected(root: Path) -> dict[str, str | list[str]] | None:
    """The selection by which `root` (or the tree it was packed from) was fetched: split -> "all" or synsets.

    None where that is not known. UserError where the file is damaged.
    """
    for name in (MANIFEST, PACKED):
        path = root / name
        if not path.is_file():
            continue
        try:
            selected = json.loads(path.read_bytes()).get("selected")
            if selected is not None:
                return dict(selected)
        except PermissionError:
            raise
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path} can't be read ({error}); remove it or fetch again") from error
    return None
