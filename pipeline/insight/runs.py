"""The runs that a command line names: run folders, and folders of runs. Knows no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.errors import UserError, permission_problem
from pipeline.run_paths import RunPaths, find_runs, not_a_run_message, run_around

T = TypeVar("T")


def expand(runs: list[str]) -> list[Path]:
    """Run folders, and those below other folders, each once. Raises UserError for what has no run."""
    found: dict[Path, None] = {}
    for run in runs:
        folder = Path(run).expanduser().resolve()
        below = find_runs(folder)
        if not below and run_around(run):
            raise UserError(not_a_run_message(run))
        if not below and folder.is_dir() and not RunPaths(folder).config.exists():
            raise UserError(f"{run} is not a run folder, and none is below it; give a --run_dir, or a folder of runs")
        found |= dict.fromkeys(path.resolve() for path in below or [folder])
    return list(found)


def distinct_names(folders: list[Path]) -> list[str]:
    """The folders' names, with as many parent folders as make them distinct."""
    deepest = max(len(folder.parts) for folder in folders)
    for depth in range(1, deepest + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            break
    return names


def read_each(runs: list[str], read: Callable[[Path], T], done: str) -> dict[Path, T]:
    """What `read` makes of each run, by its folder. One of a folder of runs that can't be read is left out, as a line
    says; for one that `runs` names, and where none is left, UserError is raised. done: such as "checked"."""
    named = {Path(run).expanduser().resolve() for run in runs}
    found = {}
    for folder in expand(runs):
        try:
            found[folder] = read(folder)
        except (UserError, PermissionError) as error:
            problem = permission_problem(error) if isinstance(error, PermissionError) else error
            if folder in named:
                raise problem from error
            whose = "" if str(folder) in str(problem) else f"{folder}: "
            print(f"left out: {whose}{problem}", flush=True)
    if not found:
        raise UserError(f"none of these runs can be {done}; the lines above say why")
    return found
