"""The part of ImageNet that a data root was asked to hold, by the file that `fetch` or `pack` left in it."""

import json
from pathlib import Path

from pipeline.errors import UserError

PACKED = "pack.json"  #: marks a folder of packed shards
MANIFEST = "fetch.json"  #: written by `fetch`; `pack` copies its selection into `pack.json`


def is_unfinished(root: Path) -> bool:
    """Was a fetch into `root` begun that has not ended yet? Then its images are a part, of no one's choice."""
    try:
        noted = json.loads((root / MANIFEST).read_bytes())
        return noted["selected"] != noted["whole"]
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return False


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
