"""`fetch.json` in a data root: where the images came from and which were asked for, so that a part can be verified."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.dataset.acquire.selection import SPLITS, Selection
from pipeline.dataset.disk import explain_read
from pipeline.dataset.selected import MANIFEST
from pipeline.errors import UserError
from pipeline.files import atomic_write

ALL = "all"

Chosen = dict[str, str | list[str]]  #: split -> "all" or sorted synsets


@dataclass
class Manifest:
    """What `fetch` has fetched, or is fetching, into a data root.

    competition: of Kaggle, or None; file: absolute path of a local archive, or None.
    selected: what is to be fetched; whole: what was complete when a fetch last finished.
    images: split -> number of images then.
    """

    competition: str | None = None
    file: str | None = None
    selected: Chosen = field(default_factory=dict)
    whole: Chosen = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    def add(self, selection: Selection) -> None:
        """Add `selection`, resolved, to the images that are to be fetched besides the complete ones."""
        self.selected = dict(self.whole)
        for split in filter(selection.has, SPLITS):
            before = self.whole.get(split, [])
            whole_split = selection.synsets is None or before == ALL
            self.selected[split] = ALL if whole_split else sorted({*before, *(selection.synsets or ())})

    def has(self, selection: Selection) -> bool:
        """Was all of `selection` whole? A number of classes, not yet resolved, counts as all of them."""
        for split in filter(selection.has, SPLITS):
            have = self.whole.get(split, [])
            if have != ALL and not (isinstance(selection.classes, tuple) and set(selection.classes) <= set(have)):
                return False
        return True

    def to_selection(self) -> Selection:
        """`selected` as a selection; all classes where the splits differ."""
        parts = list(self.selected.values())
        one = parts and parts[0] != ALL and all(part == parts[0] for part in parts)
        split = "all" if len(parts) != 1 else next(iter(self.selected))
        return Selection(split, tuple(parts[0]) if one else None)

    def write(self, root: Path) -> None:
        """Write it to `root`, all or nothing."""
        atomic_write(root / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a data root; None where it was not fetched. UserError where it is damaged."""
    path = root / MANIFEST
    try:
        return Manifest(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain_read(error, path) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} can't be read ({error}); remove it and run fetch again") from error
