"""What lies in DEST, the folder that `fetch` writes to: its kind, and whether it is whole; and who works in it now."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.dataset.acquire.manifest import read_manifest
from pipeline.dataset.acquire.selection import Selection
from pipeline.dataset.acquire.tree import STATE
from pipeline.dataset.disk import explain
from pipeline.dataset.imagenet import CLS_LOC
from pipeline.dataset.index.index import PACKED, has_index, index_folder, is_current, open_sound
from pipeline.dataset.lock import locked
from pipeline.dataset.shards.marker import find_complete, read_marker
from pipeline.dataset.shards.plan import Options as PackOptions
from pipeline.dataset.shards.restart import has_shard_files
from pipeline.errors import UserError


def check_kind(root: Path, packing: PackOptions | None) -> None:
    """UserError where ROOT holds a tree and shards were asked for, or the other way round, or other shards."""
    if packing is None and (root / PACKED).exists():
        raise UserError(f"{root} holds packed shards; add --pack, or give another folder for a tree")
    if packing is not None and (root / CLS_LOC).is_dir():
        raise UserError(f"{root} holds a tree of images; give another folder, or run: pipeline pack {root} DEST")
    if packing is not None and (root / PACKED).exists():
        marker = read_marker(root)
        difference = packing.difference(marker.get("options"))
        if difference:
            whole = packing.restart is not None and marker.get("complete")
            remedy = (
                f"make these from it: pipeline pack {root} DEST --restart {packing.restart}" if whole else "remove it"
            )
            raise UserError(f"{root} was packed with {difference}; give another folder, or {remedy}")


def is_done(root: Path, selection: Selection, index: bool, packing: PackOptions | None) -> bool:
    """Is the selection complete, and no folder changed since it was indexed? Then no request is sent to Kaggle."""
    manifest = read_manifest(root)
    if manifest is None or not manifest.has(selection) or not index or not has_index(index_folder(root)):
        return False
    opened = open_sound(index_folder(root)) if packing is None else find_complete(root)
    return opened is not None and is_current(opened) and has_shard_files(opened)


@contextlib.contextmanager
def locked_root(root: Path) -> Iterator[None]:
    """Make ROOT and `ROOT/.fetch`; UserError where another fetch works there."""
    state = root / STATE
    with contextlib.ExitStack() as stack:
        try:
            state.mkdir(parents=True, exist_ok=True)
            busy = f"another fetch is running in {root}; wait for it or stop it"
            stack.enter_context(locked(state / "lock", busy, wait=False))
        except OSError as error:
            raise explain(error, state) from error
        shutil.rmtree(state / "parts", ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(state / "parts", ignore_errors=True)
