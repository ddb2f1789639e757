"""W&B as a view of the ledger: one run over all restarts, each step once, and never an obstacle to training.

A restart repeats steps that W&B has already got. The highest steps that the ledger ever held are kept in
`wandb/sent.json`, written before the ledger forgets them, and rows up to them are not sent again.
"""

import contextlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import TrackingConfig
from pipeline.files import atomic_write, reason_of
from pipeline.redact import redact
from pipeline.run_paths import RunPaths
from pipeline.tracking.view import View
from pipeline.tracking.wandb_settings import WandbPlan, find_problem, only_variables, plan_wandb

BEST_IS_MAX = ("val_top1", "val_ema_top1")  #: W&B's summary shows the best of these, not the last
_INIT_TIMEOUT_S, _FINISH_TIMEOUT_S = 15, 60


class WandbView(View):
    """Sends rows to W&B, or does nothing where it is disabled, missing or failing.

    Args:
        config: mode, project, entity, name.
        run_dir: the run folder; W&B's own files go to its `wandb/`.
        settings: the resolved configuration, shown with the run.
        last_steps: kind of row -> its last step in the ledger, before that is cut back to the step to start from.
        say: prints one line to the user.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        settings: dict[str, Any],
        last_steps: dict[str, int],
        say: Callable[[str], None],
    ):
        self.run: Any = None
        self.failed = False  # did W&B raise while it was used?
        self.say = say
        self.paths = RunPaths(run_dir)
        if config.wandb == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        plan = plan_wandb(config)
        if plan.mode == "disabled":
            say(f"W&B: disabled {plan.why}; metrics.jsonl has everything")
            return
        try:
            self.paths.wandb.mkdir(exist_ok=True)
        except OSError as error:
            say(f"W&B: {self.paths.wandb} can't be made ({reason_of(error, run_dir)}); metrics.jsonl has everything")
            return
        self.sent = self._high_water(self.paths.wandb_sent, last_steps)
        self.taken = self.sent["train"]  # W&B has this step, and takes nothing for it or an earlier one
        try:
            import wandb
        except ImportError as error:
            say(f"W&B: can't be imported ({error}); metrics.jsonl has everything")
            return
        logging.raiseExceptions = False  # its log lies in the run folder: a disk that refuses it is no matter
        if not hasattr(wandb, "init"):
            say("W&B: not installed; metrics.jsonl has everything")
            return
        with only_variables(plan.variables):
            self._start(wandb, plan, run_dir, settings)

    @staticmethod
    def _high_water(path: Path, last_steps: dict[str, int]) -> dict[str, int]:
        """Kind of row -> the highest step ever sent; kept on disk, as the ledger forgets steps that are done again."""
        try:
            before = {str(kind): int(step) for kind, step in json.loads(path.read_text(encoding="utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            before = {}
        sent = {kind: max(before.get(kind, 0), last_steps.get(kind, 0)) for kind in ("train", "eval")}
        atomic_write(path, json.dumps(sent))
        return sent

    def _start(self, wandb: Any, plan: WandbPlan, run_dir: Path, settings: dict[str, Any]) -> None:
        mode, files = plan.mode, (plan.folder / "wandb" if plan.folder else self.paths.wandb)
        later = f"upload later with: wandb sync {files}/offline-*"
        if mode == "offline" and plan.why:
            self.say(f"W&B: offline ({plan.why}); {later}")
        problem = find_problem(plan) if mode == "online" else None
        if problem is not None:
            self.say(f"W&B: {plan.url} {problem}; continuing offline, {later}")
            mode = "offline"
        arguments = {
            "project": plan.project,
            "entity": plan.entity,
            "name": plan.name or run_dir.name,
            "id": plan.run_id or self._own_id(),
            "resume": "allow",
            "dir": str(plan.folder or run_dir),
            "config": without_credentials(settings),
            "settings": quiet_settings(wandb, plan.timeout_s),
        }
        try:
            self.run = wandb.init(mode=mode, **arguments)
        except Exception as error:  # whatever W&B raises, training continues
            self.say(f"W&B: {type(error).__name__}: {_first_line(error)}; continuing offline, {later}")
            try:
                wandb.teardown()  # else the run's id counts as in use
                self.run = wandb.init(mode="offline", **arguments)
            except Exception as second:
                self.say(f"W&B: {type(second).__name__}: {_first_line(second)}; metrics.jsonl has everything")
        for name in BEST_IS_MAX:
            if self.run is not None:
                self._try(self.run.define_metric, name, summary="max")

    def _own_id(self) -> str:
        """The id of the run in W&B, drawn at its first start; again in a copy of a run folder that is still in its
        place, as two runs must not share one."""
        file = self.paths.wandb_run_id
        own = str(self.paths.path.resolve())
        identifier, home = _read_id(file)
        if identifier and home not in ("", own) and _read_id(RunPaths(Path(home)).wandb_run_id) == (identifier, home):
            self.say(f"W&B: this run folder is a copy of {home}, so it becomes a W&B run of its own")
            identifier = ""
        if not identifier:
            identifier = uuid.uuid4().hex[:8]
        if (identifier, own) != _read_id(file):
            atomic_write(file, f"{identifier}\n{own}\n")
        return identifier

    def _try(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except Exception as error:
            self.run, self.failed = None, True
            self.say(
                f"W&B: {type(error).__name__}: {_first_line(error)}; not used any more, metrics.jsonl has everything"
            )

    def log(self, row: dict) -> None:
        """Send the numbers of a ledger row, unless a run before this start has sent its step."""
        if self.run is None or row["step"] <= self.sent[row["kind"]]:
            return
        self.sent[row["kind"]] = row["step"]  # a run that goes back repeats steps too
        step = row["step"]
        if step <= self.taken:  # an evaluation that did not come to pass before a kill: beside the next training row
            step = self.taken + 1
            self._high_water(self.paths.wandb_sent, {"train": step})
        self._try(self.run.log, {k: v for k, v in row.items() if k not in ("kind", "step")}, step=step)

    def show(self, pictures: list[Path], step: int) -> None:
        """Send pictures (PNG files) with the last step's row."""

        def send() -> None:
            from wandb import Image

            self.run.log({f"report/{path.stem}": Image(str(path)) for path in pictures}, step=step)

        if self.run is not None and pictures:
            self._try(send)

    def alert(self, text: str) -> None:
        """Send a W&B alert."""
        if self.run is not None:
            self._try(self.run.alert, title="a run needs attention", text=redact(text), level="ERROR")

    def before_rewind(self, last_steps: dict[str, int]) -> None:
        """The run is about to go back; `last_steps`: as for a start."""
        if self.run is not None:
            self.sent = self._high_water(self.paths.wandb_sent, last_steps)
            self.taken = max(self.taken, self.sent["train"])

    def close(self) -> None:
        if self.run is not None:
            self._try(self.run.finish, exit_code=0)
        if self.failed:
            import wandb

            with contextlib.suppress(Exception):  # here, as at the interpreter's exit W&B would print a traceback
                wandb.teardown()


def without_credentials(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration as W&B gets it."""
    return {name: redact(value) if isinstance(value, str) else value for name, value in settings.items()}


def quiet_settings(wandb: Any, timeout_s: float | None = None) -> Any:
    """Settings by which W&B gets the numbers and the configuration alone, and says nothing by itself. timeout_s: for a
    start, instead of the usual limit."""
    return wandb.Settings(
        init_timeout=timeout_s or _INIT_TIMEOUT_S,
        finish_timeout=_FINISH_TIMEOUT_S,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_transaction_log_flush_interval=1,
    )


def _read_id(file: Path) -> tuple[str, str]:
    """(id, run folder) that a file `run-id` says; "" for what it does not."""
    try:
        lines = [*file.read_text(encoding="utf-8").splitlines(), "", ""]
    except OSError:
        return "", ""
    return lines[0].strip(), lines[1].strip()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
