"""`fetch.json` in a data root: where the images came from and which were asked for, so that a part can be verified."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.errors import UserError

RECEIPT = "fetch.json"
ALL = "all"


@dataclass
class Receipt:
    """What `fetch` has brought into a data root.

    competition: of Kaggle, or None; file: absolute path of a local archive, or None.
    selected: split -> "all" or the synsets asked for; images: split -> number of images there after the fetch.
    complete: False from the first byte until all is there.
    """

    competition: str | None = None
    file: str | None = None
    selected: dict[str, str | list[str]] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def add(self, split: str, synsets: frozenset[str] | None) -> None:
        """Note that `split` was asked for, all of it or some classes; what was asked for before stays."""
        before = self.selected.get(split, [])
        if synsets is None or before == ALL:
            self.selected[split] = ALL
        else:
            self.selected[split] = sorted({*before, *synsets})

    def covers(self, split: str, classes: int | tuple[str, ...] | None) -> bool:
        """Is what is asked for here a part of what was fetched? A number of classes counts as more."""
        have = self.selected.get(split, [])
        return have == ALL or (isinstance(classes, tuple) and set(classes) <= set(have))

    def write(self, root: Path) -> None:
        temporary = root / f".{RECEIPT}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(root / RECEIPT)


def read_receipt(root: Path) -> Receipt | None:
    """The receipt of a data root; None where it was not fetched. UserError where it is damaged."""
    path = root / RECEIPT
    try:
        return Receipt(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read ({error}); remove it and run fetch again") from error
