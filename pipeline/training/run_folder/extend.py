"""A finished run trained on in a new run folder, which begins with a copy of the old one's last checkpoint.

Weights, momentum, average and the count of steps go on, and with it which images are seen. The learning rate follows
the same curve where a longer run would have had the same rates so far; otherwise it starts over, or stays as it was.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.config import Config, ScheduleConfig, load_config, semantic_config
from pipeline.config.time import Time, epochs_of, is_time, plain_time, steps_of
from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.run_paths import RunPaths, list_checkpoints, not_a_run_message
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.ledger_rows import last_steps, read_rows, read_rows_backwards
from pipeline.training.run_folder.checkpoint import load_state, write_checkpoint
from pipeline.training.run_folder.folder import RunFolder, event_row, make_run_folder
from pipeline.training.run_folder.manifest import DamagedCheckpoint, begun_from, read_meta, verify_checkpoint

Rate = Literal["follow", "restart", "last"]
SAME_AT_ANY_LENGTH = ("step", "multistep", "constant")  # schedules whose rates do not depend on the run's length
#: what may differ from the run that is continued: the state that is taken over has to fit, and to mean the same
_FREE = ("schedule.", "augment.", "evaluation.", "data.", "optim.lr", "optim.label_smoothing", "ema.every_steps")


@dataclass(frozen=True)
class Extension:
    """How a run is trained on. Made by `plan_extension`.

    Attributes:
        config: of the new run.
        source: the checkpoint that it begins with.
        step: number of steps done there.
        about: one line on what follows the same curve and what does not.
    """

    config: Config
    source: Path
    step: int
    about: str

    @property
    def run(self) -> Path:
        """The folder of the run that is trained on."""
        return self.source.parents[1]


def plan_extension(run: str, epochs: Time, rate: Rate | None, run_dir: str | None, overrides: list[str]) -> Extension:
    """The extension that `pipeline continue` is asked for. Reads only.

    Args:
        run: folder of a finished run.
        epochs: length of both runs together.
        rate: the learning rate from here on; None: follow, where that is possible, otherwise restart.
        run_dir: folder of the new run; None: beside the old one.
        overrides: further options of `pipeline train`.

    Raises UserError where the run is not finished, or can't be continued in this way.
    """
    paths = RunPaths(Path(run).expanduser().resolve())
    if any(item.partition("=")[0] == "--schedule.epochs" for item in overrides):
        raise UserError("give --epochs, the length of both runs together, instead of --schedule.epochs")
    if not is_time(epochs, above=True):
        raise UserError(f'--epochs {epochs}: give epochs (120 or "120ep") or batches ("5000ba"), above 0')
    epochs = plain_time(epochs)
    target = Path(run_dir).expanduser() if run_dir else paths.path.with_name(f"{paths.path.name}-to-{_short(epochs)}")
    if target.resolve() == paths.path:
        raise UserError(f"--run_dir {run_dir} is the run itself, which stays as it is; give a new folder")
    begun = None if list_checkpoints(paths.checkpoints) else _begun_extension(target, epochs, overrides)
    if begun is not None:
        _check_resume(begun.config, run, target)
        return begun
    if not paths.config.exists():
        raise UserError(not_a_run_message(run))
    old = load_config(paths.config, verb="continue")
    new = load_config(paths.config, [*overrides, f"--run_dir={target}"], verb="continue")
    _check_resume(new, run, target)
    source, step, per_epoch, last_rate = _end_of(paths, old)
    if round(steps_of(epochs, per_epoch)) <= step:
        raise UserError(
            f"--epochs {epochs}: {paths.path} has trained {count(step, 'step')} already ({step / per_epoch:.4g} "
            "epochs); it is the length of both runs together, so give more"
        )
    changed = _changed(old, new)
    kept = [name for name in changed if not name.startswith(_FREE)]
    if kept:
        raise UserError(
            f"pipeline continue keeps --{kept[0]} of {paths.path}, with whose momentum it goes on; leave it out, or "
            f"start from the weights alone: pipeline train --model.weights {paths.path}"
        )
    reshaped = any(name.startswith("schedule.") for name in changed)
    chosen = rate or ("follow" if new.schedule.name in SAME_AT_ANY_LENGTH and not reshaped else "restart")
    if chosen == "follow" and (reshaped or new.schedule.name not in SAME_AT_ANY_LENGTH):
        why = "options of the schedule are given" if reshaped else f"{new.schedule.name} depends on the run's length"
        raise UserError(f"--rate follow: {why}, so the rates so far are of another curve; give --rate restart or last")
    if "train.max_steps" not in new.given:
        new = dataclasses.replace(new, train=dataclasses.replace(new.train, max_steps=None))
    before, last = step / per_epoch, epochs_of(epochs, per_epoch)
    head = f"continuing {paths.path} from step {step:,} (epoch {before:.4g}) to epoch {last:.4g}: "
    kept_state = "weights, momentum, average and order of the images go on; "
    if chosen == "follow":
        new = dataclasses.replace(new, schedule=_followed(old.schedule, epochs, per_epoch))
        text = "the learning rates follow the same curve, as in one run of this length with the same milestones"
    elif chosen == "last":
        if not last_rate > 0:
            raise UserError(
                f"--rate last: the last learning rate of {paths.path} was {last_rate:g}; give --rate restart"
            )
        new = dataclasses.replace(
            new,
            optim=dataclasses.replace(new.optim, lr=last_rate, lr_batch_size=None),
            schedule=ScheduleConfig(name="constant", epochs=epochs, begin=f"{step}ba"),
        )
        text = f"the learning rate stays at its last, {last_rate:.4g}; not the curve of one run of this length"
    else:
        schedule = _restarted(new, epochs, step, per_epoch)
        new = dataclasses.replace(new, schedule=schedule)
        text = (
            f"the learning rates start over, {epochs_of(schedule.warmup_epochs, per_epoch):.4g} epochs of warm-up and "
            f"then {schedule.name}; not the curve of one run of this length"
        )
    others = [name for name in changed if not name.startswith("schedule.")]
    also = f"; changed from here on: {', '.join(others)}" if others else ""
    return Extension(new, source, step, head + kept_state + text + also)


def _check_resume(config: Config, run: str, target: Path) -> None:
    """Raises UserError for a `--resume` that names no checkpoint of the new run's own. run: the one that is trained on;
    target: the new run's folder."""
    if config.resume == "auto":
        return
    path = Path(config.resume).expanduser().resolve()
    if not (path.is_dir() and path.parent == RunPaths(target.resolve()).checkpoints.resolve()):
        raise UserError(
            f"--resume {config.resume}: pipeline continue always goes on, from the last checkpoint of {run} and later "
            "from the new run's own; leave --resume out, or start from the weights alone: "
            f"pipeline train --model.weights {run}"
        )


def _begun_extension(target: Path, epochs: Time, overrides: list[str]) -> Extension | None:
    """The extension that was begun in the folder `target`, which does not need the old run any more, as it has its own
    configuration and checkpoint; None: none was."""
    paths = RunPaths(target.resolve())
    saved = list_checkpoints(paths.checkpoints)
    begun = [row for row in read_rows(paths.ledger) if row.get("event") == "continued"]
    if not (saved and begun and paths.config.exists()):
        return None
    config = load_config(paths.config, [*overrides, f"--run_dir={target}"], verb="continue")
    if epochs != config.schedule.epochs:
        raise UserError(
            f"--epochs {epochs}: {paths.path} was begun with --epochs {config.schedule.epochs}, and the checkpoints of "
            f"{begun[0].get('run')}, which it continues, are gone; give the same"
        )
    about = f"{paths.path} goes on from its own checkpoints; those of {begun[0].get('run')} are gone"
    return Extension(config, saved[0][1], begun[0]["step"], about)


def _short(epochs: Time) -> str:
    return f"{epochs:g}" if isinstance(epochs, float) else str(epochs)


def _changed(old: Config, new: Config) -> list[str]:
    there, here = semantic_config(old), semantic_config(new)
    return [name for name in here if here[name] != there.get(name)]


def _end_of(paths: RunPaths, config: Config) -> tuple[Path, int, float, float]:
    """(last checkpoint, its steps, steps an epoch, learning rate of the last step before the guard lowered it)."""
    last, finished = _last_step(paths.ledger)
    saved = list_checkpoints(paths.checkpoints)
    done = last["step"] if last else 0
    if last is None or finished != done or not saved or saved[0][0] != done:
        newest = saved[0][1].name if saved else "none"
        raise UserError(
            f"{paths.path} is not finished, or its last checkpoint is gone ({count(done, 'step')} done, "
            f"newest checkpoint {newest}): run its own command to the end first, or start from its weights alone: "
            f"pipeline train --model.weights {paths.path}"
        )
    step, path = saved[0]
    samples = round(last["step"] * config.train.global_batch_size / last["epoch"])
    with _refusing_damage(paths.path):
        factor = math.prod(item[2] for item in read_meta(path).get("rollbacks", []))
    return path, step, samples / config.train.global_batch_size, last["lr"] / factor


@contextlib.contextmanager
def _refusing_damage(run: Path) -> Iterator[None]:
    """A damaged checkpoint in here is the user's to repair."""
    try:
        yield
    except DamagedCheckpoint as error:
        raise UserError(
            f"{error}; run the command of {run} again, which trains the steps since the checkpoint before, or start "
            f"from weights alone: pipeline train --model.weights CHECKPOINT"
        ) from error


def _last_step(ledger: Path) -> tuple[dict | None, int | None]:
    """The row of the last training step, and the step at which the run finished after it; None: there is none. Every
    rank asks, so only the end of the ledger is read."""
    finished = None
    for row in read_rows_backwards(ledger):
        if row.get("event") == "finished" and finished is None:
            finished = row["step"]
        elif row.get("kind") == "train" and row.get("epoch"):
            return row, finished
    return None, finished


def _followed(old: ScheduleConfig, epochs: Time, per_epoch: float) -> ScheduleConfig:
    """The same curve for longer: times as they were, whatever length they were scaled to."""
    return _scale(
        dataclasses.replace(old, epochs=epochs), _stretch(old, steps_of(old.epochs, per_epoch), per_epoch), per_epoch
    )


def _restarted(config: Config, epochs: Time, step: int, per_epoch: float) -> ScheduleConfig:
    """The recipe's curve over what is added, with a warm-up: the recipe's, or an epoch, a tenth at most, where it has
    none."""
    given = config.schedule
    added = steps_of(epochs, per_epoch) - step
    scaled = _scale(
        dataclasses.replace(given, epochs=epochs, begin=f"{step}ba"), _stretch(given, added, per_epoch), per_epoch
    )
    if "schedule.warmup_epochs" in config.given:
        warmup = given.warmup_epochs
    else:
        warmup = scaled.warmup_epochs
        if not epochs_of(warmup, per_epoch) and given.name != "one_cycle":
            warmup = round(min(1.0, added / per_epoch / 10), 6)
    return dataclasses.replace(scaled, warmup_epochs=warmup)


def _stretch(schedule: ScheduleConfig, steps: float, per_epoch: float) -> float:
    """How many times as long as the run that the times are given for."""
    return steps / steps_of(schedule.reference_epochs or schedule.epochs, per_epoch)


def _scale(schedule: ScheduleConfig, factor: float, per_epoch: float) -> ScheduleConfig:
    """Warm-up and milestones times a factor; the warm-up does not grow."""

    def scaled(value: Time, by: float) -> Time:
        return value if by == 1 else f"{round(steps_of(value, per_epoch) * by)}ba"

    return dataclasses.replace(
        schedule,
        reference_epochs=None,
        warmup_epochs=scaled(schedule.warmup_epochs, min(1.0, factor)),
        milestones=tuple(scaled(time, factor) for time in schedule.milestones),
        step_every=None if schedule.step_every is None else scaled(schedule.step_every, factor),
    )


def begin_extension(plan: Extension) -> None:
    """Make the new run folder and copy the checkpoint there, unless that is done. Rank 0 only, with the lock held.

    Raises UserError where the folder has another run.
    """
    folder: RunFolder = make_run_folder(plan.config)
    folder.check_recipe(plan.config)
    rows = list(read_rows(folder.ledger))
    noted = any(row.get("event") == "continued" for row in rows)
    begun = noted or str(plan.source) in begun_from(folder.checkpoints)  # the ledger may be lost
    if not begun and (rows or list_checkpoints(folder.checkpoints)):
        raise UserError(f"run folder {folder.path} holds another run; give another --run_dir")
    copied = bool(list_checkpoints(folder.checkpoints)) or any(row.get("kind") == "train" for row in rows)
    if not copied:
        with _refusing_damage(plan.run):
            meta = verify_checkpoint(plan.source)
    if not noted:
        facts = {"run": str(plan.run), "checkpoint": plan.source.name, "about": plan.about}
        ledger = Ledger(folder.ledger, max([plan.step, *last_steps(folder.ledger).values()]))
        ledger.append(event_row("continued", plan.step, **facts))
        ledger.close()
    if copied:
        return
    parts = [name.removesuffix(".pt") for name in meta["files"]]
    own = {key: value for key, value in meta.items() if key not in ("files", "digest", "format", "step")}
    own |= {"semantic_config": semantic_config(plan.config), "begun_from": [str(plan.source)]}
    write_checkpoint(folder.checkpoints, plan.step, load_state(plan.source, parts), own)
