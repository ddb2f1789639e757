"""Is what is asked for the recipe of the run that is there? A refusal names the options that were given."""

from collections.abc import Collection
from pathlib import Path

from pipeline.config import RawConfig, semantic_config
from pipeline.config.names import rename_flat
from pipeline.config.time import is_time, parse_time
from pipeline.errors import UserError

#: option -> those whose values follow from it unless they are given themselves
DERIVED = {
    "schedule.epochs": ("schedule.reference_epochs", "schedule.milestones", "schedule.warmup_epochs"),
    "data.image_size": ("data.val_size", "data.val_resize"),
    "data.val_size": ("data.val_resize",),
    "data.val_crop_ratio": ("data.val_resize",),
    "model.name": tuple(f"data.{name}" for name in ("image_size", "val_size", "val_resize")),
}
DERIVED["schedule.epochs"] += ("schedule.step_every", "data.ramp_epochs")
DERIVED["model.name"] += tuple(f"data.{name}" for name in ("mean", "std", "interpolation"))


def check_fingerprints(
    path: Path, meta: dict, identity: dict, index_fingerprint: str, given: Collection[str] = ()
) -> None:
    """Raises UserError that names each value in which a checkpoint's recipe or data set differs from the wanted one."""
    compare_semantic_config(meta.get("semantic_config", {}), identity, "checkpoint", path, given)
    if meta.get("index_fingerprint") != index_fingerprint:
        raise UserError(
            f"checkpoint {path} was trained on another data set: its index had the fingerprint "
            f"{meta.get('index_fingerprint')}, and that of --data.root has {index_fingerprint}; give the same "
            "--data.root with the same images (were some added, removed or rewritten, or a class folder renamed?), or "
            "another --run_dir, where --model.weights RUN_FOLDER starts from this run's weights"
        )


def differing_settings(saved: dict, asked: dict) -> tuple[dict, list[str]]:
    """(the saved settings under today's names, the names of those that differ from `asked`). A setting that was not
    known when they were saved counts as its default."""
    defaults = {name: value for name, value in semantic_config(RawConfig().resolve()).items() if name in asked}
    saved = defaults | rename_flat(saved)
    return saved, [name for name in sorted(saved.keys() | asked.keys()) if saved.get(name) != asked.get(name)]


def compare_semantic_config(saved: dict, asked: dict, what: str, path: Path, given: Collection[str] = ()) -> None:
    """Raises UserError that lists the saved settings that differ from the ones asked for; see `differing_settings`.

    Args:
        saved, asked: settings by dotted name, as `semantic_config` gives them.
        what: "checkpoint" or "run folder": what holds `saved`. path: where it is.
        given: options that the command line gave.
    """
    saved, differing = differing_settings(saved, asked)
    if not differing:
        return
    says = [
        f"{'--' * (name in given)}{name} is {saved.get(name)} in the {what}, and {asked.get(name)} is asked for"
        for name in _told(differing, given)
    ]
    remedy = "give the same, or another --run_dir (options that docs/resume.md lists may change)"
    if "schedule.epochs" in differing:
        longer = _is_longer(saved.get("schedule.epochs"), asked.get("schedule.epochs"))
        on = (
            f"to train on for longer: pipeline continue RUN_FOLDER --epochs {asked.get('schedule.epochs')}; "
            if longer
            else ""
        )
        remedy += (
            f". The learning rates follow from the run's length, so it can't be changed in place; {on}to start from "
            "its weights alone: --model.weights RUN_FOLDER with another --run_dir"
        )
    raise UserError(f"{what} {path} was made with other settings: {'; '.join(says)}; {remedy}")


def _told(differing: list[str], given: Collection[str]) -> list[str]:
    """The differing options to name: those that were given first, and none that only follows from one of these."""
    named = [name for name in differing if name in given]
    sources = [name for name, those in DERIVED.items() if name in given and set(those) & set(differing)]
    silent = {name for source in sources for name in DERIVED[source]}
    return named + [name for name in differing if name not in given and name not in silent] or sources


def _is_longer(there: object, here: object) -> bool:
    """Is one length above another in the same unit?"""
    if not all(isinstance(time, float | str) and is_time(time) for time in (there, here)):
        return False
    (before, unit), (now, other) = parse_time(there), parse_time(here)  # type: ignore[arg-type]
    return unit != other or now > before
