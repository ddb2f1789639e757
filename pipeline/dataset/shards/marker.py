"""The marker of a folder of shards (`pack.json`): of what they are made, and whether they are complete."""

import contextlib
import json
import shutil
from pathlib import Path

from pipeline.dataset.disk import explain
from pipeline.dataset.index.index import PACKED, Index, index_folder, open_sound
from pipeline.dataset.selected import MANIFEST
from pipeline.dataset.shards.plan import Options, Plan
from pipeline.dataset.shards.records import STATE
from pipeline.errors import UserError, permission_problem
from pipeline.files import PASSING, atomic_write, reason_of

_OWN = (MANIFEST, ".fetch", STATE)  # what may be there before the marker is


def read_marker(dest: Path) -> dict:
    """What the marker of packed shards notes; empty where there is none that can be read."""
    try:
        return dict(json.loads((dest / PACKED).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def find_complete(dest: Path) -> Index | None:
    """The index of the shards that were once complete in `dest`, by their marker and their sound index."""
    if read_marker(dest).get("complete"):
        with contextlib.suppress(UserError):
            return open_sound(index_folder(dest))
    return None


def refuse_foreign(dest: Path) -> None:
    """UserError where `dest` is not a folder, or holds something else than shards or what is left of their making."""
    others = (path.name for path in dest.iterdir()) if dest.is_dir() else ()
    foreign = any(PACKED not in name and name not in _OWN for name in others)
    if not (dest / PACKED).exists() and dest.exists() and (not dest.is_dir() or foreign):
        raise UserError(f"{dest} exists and holds something else; give a new or empty folder")


def _check(dest: Path, wanted: dict, options: Options) -> dict | None:
    """The marker in `dest`, None for a new folder; UserError where it holds something else, or other shards."""
    refuse_foreign(dest)
    try:
        found = dict(json.loads((dest / PACKED).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise permission_problem(error) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{dest / PACKED} can't be read ({error}); remove {dest} or give another folder") from error

    def compare(key: str) -> str:
        return "" if found.get(key) == wanted[key] else f"{key} {found.get(key)} instead of {wanted[key]}"

    difference = compare("source") or options.difference(found.get("options")) or compare("shards")
    if difference:
        raise UserError(f"{dest} was packed with {difference}; give another folder or remove it")
    return found


def prepare(dest: Path, index: Index, options: Options, plan: Plan) -> bool:
    """Make `dest` ready, or return True if it is complete. Raises UserError where it can't be used."""
    shards = {split: len(cuts) - 1 for split, cuts in plan.cuts.items()}
    marker = {"source": index.fingerprint, "options": options.marker(), "shards": shards, "complete": False}
    if _check(dest, marker, options) is not None:
        return find_complete(dest) is not None
    try:
        dest.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dest).free
        if plan.size > free:
            raise UserError(
                f"{dest} has {free / 1e9:,.1f} GB free, but {plan.size / 1e9:,.1f} GB are needed; give another folder"
            )
        atomic_write(dest / PACKED, json.dumps(marker, indent=1) + "\n")
    except OSError as error:
        if error.errno in PASSING:
            raise explain(error, dest) from error
        raise UserError(f"can't write into {dest} ({reason_of(error, dest)}); give another folder") from error
    return False


def note_source(dest: Path, notes_of_source: dict) -> None:
    """Let the marker of complete shards say what it would if they were packed now from the same images."""
    marker = read_marker(dest)
    if marker | notes_of_source != marker:
        atomic_write(dest / PACKED, json.dumps(marker | notes_of_source, indent=1) + "\n")
