"""The data set of a run: its index opened on every rank, built first by rank 0 where it is missing."""

import contextlib
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.config import DataConfig
from pipeline.dataset.index.index import Index, has_index, locate_index, open_index, open_sound
from pipeline.dataset.index.notes import left_out_lines, nested_lines
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.layouts.find import Alone
from pipeline.errors import TransientError, UserError
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.world import World

_VISIBLE_AFTER_S = 60


def open_data(
    data: DataConfig,
    world: World,
    say: Callable[[str], None],
    alone: Alone | None = None,
    stop: StopRequest | None = None,
) -> Index:
    """The index of data.root. Collective. Raises UserError where there is no data set.

    alone: this split alone will do; see `build_index`. stop: a request ends the building of a missing
    index at once, by KeyboardInterrupt; what was scanned is kept.
    """

    def build() -> Path:
        if not data.root:
            raise UserError("--data.root is missing: give the folder that holds train/ and val/")
        root = Path(data.root).expanduser()
        folder = Path(data.index).expanduser() if data.index else None
        missing = not has_index(locate_index(data))
        if missing and root.is_dir() and alone is None:
            say(f"no index at {locate_index(data)}: building it (once)")
        with stop.raising() if stop is not None and missing else contextlib.nullcontext():
            made = build_index(root, folder, alone=alone)
        for line in (*left_out_lines(made), *nested_lines(made)):
            say(line)
        return made.folder

    return _open_here(world.on_rank_zero(build, limit_s=math.inf), world)


def check_labels(index: Index, classes: int) -> None:
    """Raises UserError that names the first file whose label is none of 0..classes-1."""
    for split in index.splits.values():
        labels = split.records["label"]
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            sample = int(wrong[0])
            raise UserError(
                f"{split.name(sample)} has label {int(labels[sample])}, the model has classes 0 to {classes - 1} "
                f"({len(wrong):,} such samples); build the index again: pipeline index ROOT"
            )


def _open_here(folder: Path, world: World) -> Index:
    """Open what rank 0 has opened already. A network file system may show a new file to another node a little later."""
    deadline = time.monotonic() + _VISIBLE_AFTER_S
    while True:
        try:
            return open_index(folder) if world.is_rank_zero else open_sound(folder)  # rank 0 has checked it
        except UserError as error:
            if world.is_rank_zero or time.monotonic() > deadline:
                raise TransientError(
                    f"on {socket.gethostname()}: {error}; rank 0 can read it: is it mounted here?"
                ) from error
            time.sleep(0.5)
