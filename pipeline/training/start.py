"""Where a run starts, or goes back to: the newest good checkpoint of this run and this history."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Config, semantic_config
from pipeline.errors import UserError
from pipeline.tracking.ledger import read_rows
from pipeline.training.guard import Guard, Rollback, rollbacks_of
from pipeline.training.run_folder.checkpoint import (
    DamagedCheckpoint,
    check_fingerprints,
    find_newest_good,
    verify_checkpoint,
)
from pipeline.training.run_folder.folder import RunFolder


@dataclass(frozen=True)
class Start:
    """path: a verified checkpoint folder; None: the beginning. meta: its meta. rollbacks: where the run went back."""

    path: Path | None = None
    meta: dict = field(default_factory=dict)
    rollbacks: list[Rollback] = field(default_factory=list)


def find_start(
    config: Config, folder: RunFolder, guard: Guard, index_fingerprint: str, warn: Callable[[str], None]
) -> Start:
    """Where `config.resume` says. Rank 0 only. Raises UserError for a checkpoint of another recipe or data set."""
    guard.take_up(read_rows(folder.ledger))
    if config.resume in ("auto", "never"):
        found = find_newest_good(folder.checkpoints, warn, guard.belongs)
    else:
        path = Path(config.resume).expanduser()
        try:
            found = path, verify_checkpoint(path)
        except DamagedCheckpoint as error:
            raise UserError(f"--resume {path}: {error}; give another checkpoint folder, or 'auto'") from error
    if found is None:
        return Start(rollbacks=guard.rollbacks)
    check_fingerprints(*found, semantic_config(config), index_fingerprint)
    return Start(*found, guard.rollbacks or rollbacks_of(found[1]))


def find_way_back(folder: RunFolder, guard: Guard, warn: Callable[[str], None]) -> tuple[Path | None, dict]:
    """The last checkpoint before the trouble that `guard` met, and its meta; before the one that was tried last, if the
    trouble is the same. Rank 0 only."""

    def until(step: int) -> tuple[Path, dict] | None:
        return find_newest_good(folder.checkpoints, warn, lambda meta: meta["step"] <= step and guard.belongs(meta))

    found = until(guard.rollbacks[-1].to - 1) if guard.failed_again() else None
    return found or until(guard.tripped) or (None, {})
