"""The runs that a command line names: run folders, and folders of runs. Knows no torch."""

from pathlib import Path

from pipeline.errors import UserError
from pipeline.run_paths import RunPaths, find_runs, not_a_run_message, run_around


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
