"""W&B as a view of the ledger: one run over all restarts, each step once, and never an obstacle to training.

A restart repeats steps that W&B has already got. The highest steps that the ledger ever held are kept in
`wandb/sent.json`, written before the ledger forgets them, and rows up to them are not sent again.
"""

import json
import logging
import netrc
import os
import uuid
from pathlib import Path
from urllib.parse import urlparse

from pipeline.config import TrackingConfig
from pipeline.files import atomic_write
from pipeline.redact import redact
from pipeline.run_paths import RunPaths

_INIT_TIMEOUT_S, _FINISH_TIMEOUT_S = 30, 60


class WandbView:
    """Sends rows to W&B, or does nothing where it is disabled, missing or failing.

    Args:
        config: mode, project, entity, name.
        run_dir: the run folder; W&B's own files go to its `wandb/`.
        settings: the resolved configuration, shown with the run.
        last_steps: kind of row -> its last step in the ledger, before that is cut back to the step to start from.
        say: prints one line to the user.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, settings: dict, last_steps: dict[str, int], say):
        self.run, self.say = None, say
        self.paths = RunPaths(run_dir)
        if config.wandb == "disabled":
            return
        self.paths.wandb.mkdir(exist_ok=True)
        self.sent = self._high_water(self.paths.wandb_sent, last_steps)
        self.taken = self.sent["train"]  # W&B has this step, and takes nothing for it or an earlier one
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError as error:
            say(f"W&B: can't be imported ({error}); metrics.jsonl has everything")
            return
        logging.raiseExceptions = False  # its log lies in the run folder: a disk that refuses it is no matter
        if not hasattr(wandb, "init"):
            say("W&B: not installed; metrics.jsonl has everything")
            return
        self._start(wandb, config, run_dir, settings)

    @staticmethod
    def _high_water(path: Path, last_steps: dict[str, int]) -> dict[str, int]:
        """Kind of row -> the highest step ever sent; kept on disk, as the ledger forgets steps that are done again."""
        try:
            before = {str(kind): int(step) for kind, step in json.loads(path.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError):
            before = {}
        sent = {kind: max(before.get(kind, 0), last_steps.get(kind, 0)) for kind in ("train", "eval")}
        atomic_write(path, json.dumps(sent))
        return sent

    def _start(self, wandb, config: TrackingConfig, run_dir: Path, settings: dict) -> None:
        mode = config.wandb
        if mode == "auto":
            mode = "online" if has_key() else "offline"
            if mode == "offline":
                self.say(f"W&B: no key, so offline; upload later with: wandb sync {self.paths.wandb}/offline-*")
        identifier = self.paths.wandb_run_id
        if not identifier.exists():
            atomic_write(identifier, uuid.uuid4().hex[:8])
        arguments = {
            "project": config.project,
            "entity": config.entity,
            "name": config.name or run_dir.name,
            "id": identifier.read_text().strip(),
            "resume": "allow",
            "dir": str(run_dir),
            "config": {k: redact(v) if isinstance(v, str) else v for k, v in settings.items()},
            "settings": quiet_settings(wandb),
        }
        try:
            self.run = wandb.init(mode=mode, **arguments)
        except Exception as error:  # whatever W&B raises, training goes on
            self.say(f"W&B: {type(error).__name__}: {_first_line(error)}; going on offline")
            try:
                wandb.teardown()  # else the run's id counts as in use
                self.run = wandb.init(mode="offline", **arguments)
            except Exception as second:
                self.say(f"W&B: {type(second).__name__}: {_first_line(second)}; metrics.jsonl has everything")
        for name in ("val_top1", "val_ema_top1"):
            if self.run is not None:
                self._try(self.run.define_metric, name, summary="max")

    def _try(self, function, *arguments, **options) -> None:
        try:
            function(*arguments, **options)
        except Exception as error:
            self.run = None
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
        """Send a message to those whom W&B tells of this project."""
        if self.run is not None:
            self._try(self.run.alert, title="a run needs attention", text=redact(text), level="ERROR")

    def expect_rewind(self, last_steps: dict[str, int]) -> None:
        """The run is about to go back; `last_steps`: as for a start."""
        if self.run is not None:
            self.sent = self._high_water(self.paths.wandb_sent, last_steps)
            self.taken = max(self.taken, self.sent["train"])

    def close(self, exit_code: int = 0) -> None:
        if self.run is not None:
            self._try(self.run.finish, exit_code=exit_code)


def quiet_settings(wandb):
    """Settings by which W&B gets the numbers and the configuration alone, and says nothing by itself."""
    return wandb.Settings(
        init_timeout=_INIT_TIMEOUT_S,
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


def has_key() -> bool:
    """Is there a key for W&B's server, in the environment or from `wandb login`?"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(server or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
