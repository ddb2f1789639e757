"""Where a run starts, or rolls back to: the newest good checkpoint that is part of this run's history."""

import contextlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import Config, semantic_config
from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.run_paths import META, RunPaths, list_checkpoints
from pipeline.tracking.eval_rows import early_stop
from pipeline.tracking.ledger_rows import lost_in_words, lost_steps, read_rows
from pipeline.training.guard import (
    INHERITED,
    Guard,
    Rollback,
    inherited_rollbacks,
    is_in_history,
    rollbacks_of,
    rollbacks_of_ledger,
)
from pipeline.training.optim.lr_schedule import Schedule
from pipeline.training.run_folder.folder import RunFolder
from pipeline.training.run_folder.manifest import (
    DamagedCheckpoint,
    begun_from,
    find_newest_good,
    read_meta,
    verify_checkpoint,
)
from pipeline.training.run_folder.same_recipe import check_fingerprints

#: events that only a run with a checkpoint records
_AFTER_A_SAVE = ("interrupted", "finished", "resumed", "continued")


@dataclass(frozen=True)
class Start:
    """A state to train from.

    Attributes:
        path: a verified checkpoint folder; None: step 0, with new weights.
        meta: the checkpoint's manifest.
        rollbacks: of the run so far.
        went_back: `--resume PATH` was followed; what this run did after it is to be set aside.
        is_saved: is `path` a checkpoint of this run? `--resume PATH` may name another run's, which may go away.
        inherited: those of the rollbacks that the ledger does not have yet: of the run that saved the checkpoint.
        begun_from: the checkpoints that the run was told to start from, by `--resume PATH` or `pipeline continue`. Its
            own checkpoints list them, as the ledger may be lost.
    """

    path: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    rollbacks: list[Rollback] = field(default_factory=list)
    went_back: bool = False
    is_saved: bool = True
    inherited: list[Rollback] = field(default_factory=list)
    begun_from: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.meta.get("step", 0)

    @property
    def own_step(self) -> int:
        """Up to this step the run's own rows and checkpoints lead to here: to none of them where it begins again, with
        another run's checkpoint."""
        return self.step if self.is_saved else 0

    @property
    def blacklist(self) -> dict[int, int]:
        """Unreadable sample -> the step in which it was found."""
        return dict(self.meta.get("blacklist", []))

    @property
    def last_good_step(self) -> int | None:
        """The last step before bad ones, if the checkpoint was saved among these; see `Guard`."""
        return self.meta.get("last_good_step")

    @property
    def parts(self) -> list[str]:
        """Names of the state_dicts in the checkpoint: "model", "optimizer", "ema"."""
        return [name.removesuffix(".pt") for name in self.meta["files"]]


def resume_option(config: Config) -> str:
    """The checkpoint that `--resume PATH` names, as the ledger's row of a start records it."""
    return str(Path(config.resume).expanduser().resolve())


def start_facts(start: Start, config: Config) -> dict[str, Any]:
    """What the ledger's row of a start says of the checkpoint, beside its step."""
    facts: dict[str, Any] = {}
    if config.resume not in ("auto", "never"):
        facts |= {"resume_option": resume_option(config), "of_another_run": start.went_back and not start.is_saved}
    if start.inherited:
        facts[INHERITED] = [list(astuple(item)) for item in start.inherited]
    return facts


def named_checkpoint(option: str) -> Path:
    """The checkpoint folder that `--resume PATH` names. Raises UserError where there is none, with those nearby."""
    if not option:
        raise UserError("--resume is empty: give a checkpoint folder, auto or never")
    path = Path(option).expanduser()
    if path.is_dir() and ((path / META).exists() or path.name.startswith("step-")):
        return path
    if (path.parent / META).exists():
        raise UserError(f"--resume {option} is a file of a checkpoint; give its folder: --resume {path.parent}")
    there = list_checkpoints(path) or list_checkpoints(RunPaths(path).checkpoints)
    if there:
        raise UserError(
            f"--resume {option} is a folder of {count(len(there), 'checkpoint')}; give one of them, such "
            f"as the newest: --resume {there[0][1]}"
        )
    raise UserError(
        f"--resume {option}: {'no checkpoint is there' if path.exists() else 'no such folder'}; give a checkpoint "
        "folder (RUN/checkpoints/step-...), or auto: the newest one in --run_dir"
    )


def _find_good(
    folder: RunFolder, warn: Callable[[str], None], accept: Callable[[dict], bool]
) -> tuple[Path, dict] | None:
    """The newest good checkpoint that is accepted; None: there is none. Raises UserError where that may be so only
    because others are damaged: the run would start over, and the rows of its ledger would go."""
    damaged: list[str] = []

    def note(fault: str) -> None:
        damaged.append(fault)
        warn(fault)

    found = find_newest_good(folder.checkpoints, note, accept)
    if found is None and damaged:
        raise UserError(
            f"run folder {folder.path} has no undamaged checkpoint to resume from ({len(damaged)} damaged); put copies "
            "of them back, or start over with another --run_dir"
        )
    return found


def _newest(folder: RunFolder, rows: list[dict], warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest good checkpoint of this run's history; None before the first one was saved.

    Raises UserError where all are damaged, or where the ledger says that there was one and none is left.
    """
    rollbacks = rollbacks_of_ledger(rows)
    found = _find_good(folder, warn, lambda meta: is_in_history(meta, rollbacks))
    saved = [row["step"] for row in rows if row.get("kind") == "eval" or row.get("event") in _AFTER_A_SAVE]
    if found is None and max(saved, default=0) > 0 and not list_checkpoints(folder.checkpoints):
        done = max(row.get("step", 0) for row in rows)
        raise UserError(
            f"run folder {folder.path} has no checkpoint, though its metrics.jsonl records {count(done, 'step')}; "
            "put its checkpoints back, or give another --run_dir"
        )
    return found


def _is_in(path: Path, folder: Path) -> bool:
    """Does `path` lie in `folder`, whichever of them is a symbolic link?"""
    return folder.resolve() in (path.resolve().parent, path.parent.resolve())


def _own_copy(folder: RunFolder, meta: dict) -> tuple[Path, dict] | None:
    """The run's own checkpoint, where it is the one with this manifest: its folder is a copy of the other run's."""
    own = folder.checkpoint(meta["step"])
    with contextlib.suppress(DamagedCheckpoint):
        if own.is_dir() and read_meta(own)["digest"] == meta["digest"]:
            return own, verify_checkpoint(own)
    return None


def _was_followed(config: Config, folder: RunFolder, rows: list[dict]) -> bool:
    """Has an earlier start of this run followed `--resume PATH` already? A batch script that is requeued repeats it.
    The ledger says so, and the checkpoints since then."""
    option = resume_option(config)
    return any(row.get("resume_option") == option for row in rows) or option in begun_from(folder.checkpoints)


def find_start(
    config: Config, folder: RunFolder, index_fingerprint: str, last_step: int, warn: Callable[[str], None]
) -> Start:
    """The start that `config.resume` asks for. Rank 0 only.

    Raises UserError for a checkpoint of a different recipe or data set, or with more than `last_step` steps done.
    """
    rows = list(read_rows(folder.ledger))
    rollbacks = rollbacks_of_ledger(rows)
    explicit = config.resume not in ("auto", "never")
    scores = [row for row in rows if row.get("kind") == "eval"]
    ended = bool(scores) and (
        scores[-1]["step"] == last_step or early_stop(scores, config.train.stop_after_evals_without_gain) is not None
    )
    # scored is not enough: a full disk may have kept the last checkpoint away
    finished = any(row.get("event") == "finished" and row.get("step") == scores[-1]["step"] for row in rows if ended)
    if finished and not explicit and not list_checkpoints(folder.checkpoints):
        return Start(meta={"step": scores[-1]["step"]}, rollbacks=rollbacks)  # finished: nothing is trained
    found: tuple[Path, dict] | None = None
    if not explicit:
        found = _newest(folder, rows, warn)
    elif _was_followed(config, folder, rows):
        found = _find_good(folder, warn, lambda meta: is_in_history(meta, rollbacks))
        if found is not None:
            warn(f"--resume {config.resume} was followed by an earlier start; resuming from {found[0].name}")
    went_back = explicit and found is None
    if went_back:
        path = named_checkpoint(config.resume)
        try:
            found = path, verify_checkpoint(path)
        except DamagedCheckpoint as error:
            raise UserError(f"--resume {path}: {error}; give another checkpoint folder, or 'auto'") from error
    if found is None:
        return Start(rollbacks=rollbacks)
    check_fingerprints(*found, semantic_config(config), index_fingerprint, config.given)
    if went_back:
        found = _own_copy(folder, found[1]) or found
    own = not went_back or _is_in(found[0], folder.checkpoints)
    if went_back:  # those of the way that is given up are set aside with it
        rollbacks = [rollback for rollback in rollbacks if rollback in rollbacks_of(found[1])]
    inherited = inherited_rollbacks(found[1], rollbacks)
    followed = begun_from(folder.checkpoints) if own else []
    if went_back and resume_option(config) not in followed:
        followed.append(resume_option(config))
    start = Start(*found, [*inherited, *rollbacks], went_back, own, inherited, followed)
    if start.step > last_step:
        raise UserError(
            f"{start.path} is at step {start.step}, past the end at {last_step}; "
            "raise --train.max_steps, or give another --run_dir"
        )
    lost = lost_steps(rows, start.step) if own else []
    if lost:
        warn(
            f"{folder.ledger} has no rows of {lost_in_words(lost)}, and the run has trained "
            f"{count(start.step, 'step')}: it goes on, and curves, best score and audit lack them; if you have a copy "
            "of the file, stop the run and put the rows back"
        )
    return start


def check_begin(start: Start, schedule: Schedule, folder: RunFolder) -> None:
    """Raises UserError where a run would start before the first step of its schedule, which has no rate there."""
    if start.step >= schedule.begin:
        return
    raise UserError(
        f"--schedule.begin {schedule.config.begin}: the learning rates begin after step {schedule.begin:,}, and "
        f"{folder.path} has no checkpoint to start from but step {start.step:,}; --schedule.begin is for a run that "
        "another one began: pipeline continue RUN_FOLDER --epochs N"
    )


def needed_for_rollback(folder: Path) -> set[int]:
    """The step of the last checkpoint before bad steps, if the newest one was saved among them; otherwise nothing."""
    saved = list_checkpoints(folder)
    try:
        last_good = read_meta(saved[0][1]).get("last_good_step") if saved else None
    except DamagedCheckpoint:
        return set()
    before = [step for step, _ in saved if last_good is not None and step <= last_good]
    return set(before[:1])


def find_rollback_start(folder: RunFolder, guard: Guard, warn: Callable[[str], None]) -> Start:
    """The last checkpoint before the bad steps that `guard` counted. Rank 0 only.

    If the steps after the last rollback failed again, it is a checkpoint before the one that was used then. Raises
    UserError where all are damaged.
    """
    assert guard.tripped is not None

    def is_up_to(step: int) -> Callable[[dict], bool]:
        return lambda meta: meta["step"] <= step and is_in_history(meta, guard.rollbacks)

    found: tuple[Path, dict] | None = None
    if guard.failed_again():
        found = find_newest_good(folder.checkpoints, warn, is_up_to(guard.rollbacks[-1].to - 1))
    return Start(*(found or _find_good(folder, warn, is_up_to(guard.tripped)) or (None, {})))
