"""The verb `resend`: a run's whole history to W&B, from its `metrics.jsonl`, which has every step once.

For runs whose W&B rows are incomplete: a server that was down or refused, a process that was killed before its last
rows were on the disk. It makes a W&B run of its own, as W&B takes no step that is older than its last.
"""

import dataclasses
import os
import uuid
from pathlib import Path
from typing import Literal

from pipeline.command import run_command
from pipeline.config import load_config
from pipeline.config.run import semantic_config
from pipeline.counts import count
from pipeline.errors import EXIT_OK, TransientError, UserError
from pipeline.progress import Progress
from pipeline.run_paths import RunPaths
from pipeline.tracking.ledger_rows import from_word, read_rows
from pipeline.tracking.wandb_settings import client_variables, only_variables, plan_wandb


def resend(
    run: str,
    mode: Literal["online", "offline"] | None = None,
    project: str | None = None,
    entity: str | None = None,
    name: str | None = None,
) -> int:
    """Send a run's whole history to W&B, as a new W&B run, from its metrics.jsonl.

    Args:
        run: the run folder.
        mode: online; or offline, for a later `wandb sync`. Default: as WANDB_MODE says, else online.
        project: default: as the run had it, else WANDB_PROJECT.
        entity: default: as the run had it, else WANDB_ENTITY.
        name: of the new W&B run; default: the run's, with "-resent".
    """
    paths = RunPaths(Path(run).expanduser().resolve())
    folder, ledger = paths.path, paths.ledger
    if not ledger.exists():
        raise UserError(f"{folder} has no metrics.jsonl; give a run folder")
    config = load_config(paths.config)
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    variables, refused = client_variables()
    if refused:
        raise UserError(f"W&B: {refused[0]}; fix it or unset it")
    plan = plan_wandb(dataclasses.replace(config.tracking, wandb="online"), (variables, refused))
    if mode is None and plan.mode == "disabled":
        raise UserError(f"W&B is disabled {plan.why}; give --mode online, or --mode offline for a later wandb sync")
    rows = [row for row in read_rows(ledger) if row.get("kind") in ("train", "eval") and "step" in row]
    try:
        import wandb

        from pipeline.tracking.wandb_view import BEST_IS_MAX, quiet_settings, without_credentials

        with only_variables(variables):
            sent = wandb.init(
                project=project or plan.project,
                entity=entity or plan.entity,
                name=name or f"{plan.name or folder.name}-resent",
                id=uuid.uuid4().hex[:8],  # not WANDB_RUN_ID, which is the run's own
                resume="never",
                dir=str(plan.folder or folder),
                config=without_credentials(semantic_config(config)),
                mode=mode or plan.mode,
                settings=quiet_settings(wandb, plan.timeout_s),
            )
    except ImportError as error:
        raise UserError(f"W&B can't be imported ({error}); pip install wandb") from error
    except wandb.errors.Error as error:
        first = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, wandb.errors.UsageError | wandb.errors.AuthenticationError):
            raise UserError(f"W&B: {first}") from error
        raise TransientError(f"W&B: {first}; try again, or give --mode offline and later: wandb sync") from error
    for best in BEST_IS_MAX:
        sent.define_metric(best, summary="max")
    with Progress("sending", len(rows), "rows") as progress:
        for row in sorted(rows, key=lambda row: row["step"]):  # stable: a step's evaluation comes after it
            numbers = {key: from_word(value) for key, value in row.items() if key not in ("kind", "step")}
            sent.log(numbers, step=row["step"])
            progress.advance()
    sent.finish()
    print(f"{count(len(rows), 'row')}: {sent.url or sent.dir}")
    return EXIT_OK


def main(argv: list[str]) -> int:
    return run_command(resend, "resend", argv)
