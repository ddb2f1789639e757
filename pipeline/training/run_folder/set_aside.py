"""What a run did after the checkpoint that it goes back to, because `--resume PATH` says so or because later ones are
damaged: kept beside the run, not in its way. (Left there, they would count among the newest, which are kept: others
would be pruned in their favor.)"""

import json
import shutil
from collections.abc import Callable, Sequence

from pipeline.counts import count
from pipeline.files import atomic_write
from pipeline.run_paths import RunPaths, checkpoint_name, list_checkpoints
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.guard import Rollback, rollbacks_of_ledger


def set_aside(folder: RunPaths, step: int, rollbacks: Sequence[Rollback], say: Callable[[str], None]) -> None:
    """Move checkpoints of steps after `step` into a folder `set-aside-after-step-...` of the run folder, and copy the
    ledger's rows of those steps there. Rank 0 only. Nothing happens where there are none. rollbacks: of the run up to
    `step`; the ledger's rows of others are moved there, too.

    The rows come first: after a kill in between the run resumes from `step`, as no later checkpoint is left.
    """

    def is_of_another_way(row: dict) -> bool:
        return any(rollback not in rollbacks for rollback in rollbacks_of_ledger([row]))

    before = list(read_rows(folder.ledger))
    rows = [
        row for row in before if is_of_another_way(row) or (row.get("kind") != "event" and row.get("step", 0) > step)
    ]
    later = [path for found, path in list_checkpoints(folder.checkpoints) if found > step]
    if not rows and not later:
        return
    name = f"set-aside-after-{checkpoint_name(step)}"
    number = 1
    while (folder.path / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    aside = folder.path / (name if number == 1 else f"{name}-{number}")
    aside.mkdir()
    if rows:
        atomic_write(aside / folder.ledger.name, "".join(json.dumps(row) + "\n" for row in rows))
    for path in later:
        (aside / folder.checkpoints.name).mkdir(exist_ok=True)
        shutil.move(path, aside / folder.checkpoints.name)  # copies where an overlay can't rename a folder
    if any(map(is_of_another_way, before)):
        kept = [row for row in before if not is_of_another_way(row)]
        atomic_write(folder.ledger, "".join(json.dumps(row) + "\n" for row in kept))
    say(
        f"going back to step {step}: {count(len(later), 'later checkpoint')} and {count(len(rows), 'row')} of the "
        f"ledger are in {aside}"
    )
