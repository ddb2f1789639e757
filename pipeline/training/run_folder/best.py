"""The checkpoint that is meant where weights are asked for and a run folder is named."""

from pathlib import Path

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.run_paths import RunPaths, list_checkpoints
from pipeline.tracking.eval_rows import best_step
from pipeline.tracking.ledger_rows import read_rows


def place_of_weights(config: ModelConfig) -> Path | None:
    """The best checkpoint of the run that `model.weights` names, the newest where none was scored; None where it names
    anything else than a run folder. Raises UserError for a run without checkpoints."""
    if config.weights is None:
        return None
    run = RunPaths(Path(config.weights).expanduser())
    if not run.config.exists() and not run.checkpoints.is_dir():
        return None
    there = dict(list_checkpoints(run.checkpoints))
    if not there:
        raise UserError(f"--model.weights {config.weights}: this run has no checkpoint; give another run, or a file")
    best = best_step(row for row in read_rows(run.ledger) if row.get("kind") == "eval")
    return there[best if best in there else max(there)]
