"""The file names of a run folder. Every other module takes them from here; nothing heavy is imported."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

#: the markers that say how the last start ended; at most one of them exists
END_MARKERS = ("interrupted", "finished", "failed")
META = "meta.json"  # in a checkpoint folder: step, fingerprints, and size and digest of every other file
_STEP = "step-"


@dataclass(frozen=True)
class RunPaths:
    """The paths in the run folder `path`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        """One JSON object a line; see `pipeline.tracking.ledger`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self.checkpoints / checkpoint_name(step)

    @property
    def stop(self) -> Path:
        """Its appearance asks the run to save and stop; its text is the reason."""
        return self.path / "stop"

    @property
    def lock(self) -> Path:
        """Names the process that trains here."""
        return self.path / "lock"

    @property
    def interrupted(self) -> Path:
        return self.path / "interrupted"

    @property
    def finished(self) -> Path:
        return self.path / "finished"

    @property
    def failed(self) -> Path:
        return self.path / "failed"

    @property
    def report(self) -> Path:
        """The folder of the HTML report."""
        return self.path / "report"

    @property
    def report_page(self) -> Path:
        return self.report / "index.html"

    @property
    def wandb(self) -> Path:
        """W&B's own files, and the two below."""
        return self.path / "wandb"

    @property
    def wandb_run_id(self) -> Path:
        return self.wandb / "run-id"

    @property
    def wandb_sent(self) -> Path:
        """The highest steps ever sent to W&B, JSON."""
        return self.wandb / "sent.json"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def debug(self) -> Path:
        """Stacks and collectives of ranks that hung or failed."""
        return self.path / "debug"

    @property
    def evaluation(self) -> Path:
        """Partial sums of `pipeline evaluate`, while it is at work."""
        return self.path / "evaluation"

    @property
    def compile_cache(self) -> Path:
        """What torch.compile has made, for the next start."""
        return self.path / "compile_cache"

    @property
    def profile(self) -> Path:
        """Traces of `train.profile_steps`."""
        return self.path / "profile"


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint folder, e.g. step-000012345."""
    return f"{_STEP}{step:09d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoint folders in `folder`, newest first, verified or not."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            number = path.name.removeprefix(_STEP)
            if path.name.startswith(_STEP) and number.isdigit() and path.is_dir():
                found.append((int(number), path))
    return sorted(found, reverse=True)


def is_run(folder: Path) -> bool:
    """Has a run begun in this folder?"""
    paths = RunPaths(folder)
    return (paths.config.is_file() and paths.checkpoints.is_dir()) or paths.ledger.is_file()


def run_around(path: str | Path) -> Path | None:
    """The run folder that a path lies in; None: in none."""
    above = Path(path).expanduser().absolute().parents[:3]
    return next((place for place in above if RunPaths(place).config.is_file()), None)


def not_a_run_message(run: str | Path, checkpoints: bool = False) -> str:
    """What to say of a path that is not a run folder: it names the run folder that it lies in, if there is one.
    checkpoints: does the verb take --checkpoint?"""
    path, above = Path(run).expanduser().absolute(), run_around(run)
    if above is None:
        return f"{run} is not a run folder: it has no config.yaml; give the --run_dir of a run"
    step = next((part for part in path.relative_to(above).parts if part.startswith(_STEP)), None)
    return f"{run} is not a run folder, but lies in one: give {above}" + (
        f" --checkpoint {step}" if step and checkpoints else ""
    )


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """The folder itself if it is a run's, otherwise the run folders below it, by name; [] where there are none. A run's
    own folders are not searched, nor hidden ones or ones that this account may not enter, nor what lies deeper than
    `depth` folders."""
    if is_run(folder) or not folder.is_dir():
        return [folder] if is_run(folder) else []
    found: list[Path] = []
    if depth:
        with os.scandir(folder) as entries:
            below = sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        for path in map(Path, below):
            with contextlib.suppress(PermissionError):  # another account's, closed to this one
                if not path.is_symlink() or is_run(path):  # a link to another folder of runs may lead back
                    found += find_runs(path, depth - 1)
    return found
