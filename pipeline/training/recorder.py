"""What rank 0 keeps of a run while it trains: the ledger, its view in W&B, the checkpoints, the marks of its end."""

import dataclasses
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.config import Config, semantic_config
from pipeline.errors import TransientError
from pipeline.loader.plan import TrainPlan
from pipeline.tracking.console import Console
from pipeline.tracking.ledger import Ledger, best_step, last_steps
from pipeline.tracking.wandb_view import WandbView
from pipeline.training.evaluate import Scores
from pipeline.training.final_report import write_report
from pipeline.training.guard import Rollback, Spikes
from pipeline.training.ranks.step_stats import StepStats
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.stragglers import Slow
from pipeline.training.ranks.world import World
from pipeline.training.run_folder.checkpoint import CheckpointWriter
from pipeline.training.run_folder.folder import RunFolder, slurm_facts
from pipeline.training.run_folder.outage import Outage
from pipeline.training.run_folder.snapshot import HostCopy, Snapshot

SPIKE_WARNING_STEPS = 100


class RunRecorder:
    """The books of a run; opened at `step`, whose later rows are taken out.

    Args:
        config: of the run.
        folder: its folder.
        plan: of its samples.
        console: where it is told of.
        world: of this start.
    """

    def __init__(self, config: Config, folder: RunFolder, plan: TrainPlan, console: Console, step: int, world: World):
        self.config, self.folder, self.plan, self.console = config, folder, plan, console
        settings = semantic_config(config) | {"world_size": world.size}
        self.wandb = WandbView(config.tracking, folder.path, settings, last_steps(folder.ledger), console.say)
        self.ledger = Ledger(folder.ledger, step)
        self.spikes = Spikes(config.guard.spike_factor, self.ledger.losses)
        self.writer = CheckpointWriter(
            folder.checkpoints,
            config.checkpoint.keep,
            protected=lambda: {best_step(self.ledger.evaluations)},
            warn=self.alarm,
            before=self._before_checkpoint,
        )
        self.host_copy = HostCopy(world.device, console.warn)
        self.outage = Outage(folder.path, 60 * config.checkpoint.outage_timeout_minutes, self.alarm)
        self.owes_save = False  # was the run folder away?
        self.next_spike_warning = 0  # step
        self.fence: Callable[[], None] = lambda: None  # called before anything is written; see RunLock.confirm

    def epoch(self, step: int) -> float:
        return step * self.plan.global_batch_size / self.plan.samples

    def record_step(self, report: StepStats, ids: np.ndarray, lr: float) -> None:
        """The ledger's row of a step: row s says that s steps are done. ids: as they were used, of all ranks."""
        done = report.step + 1
        row = {
            "kind": "train",
            "step": done,
            "epoch": self.epoch(done),
            "loss": report.loss,
            "top1": report.top1,
            "lr": lr,
            "images_per_s": self.plan.global_batch_size / report.step_s,
            "data_wait_fraction": min(1.0, report.wait_s / report.step_s),
            "grad_norm": report.grad_norm,
            "batch_digest": self.plan.digest(report.step, ids),
        }
        if self.config.train.precision == "fp16":
            row["loss_scale"] = report.scale
        if not math.isfinite(report.grad_norm):
            row["skipped"] = True
        if self.spikes.note(report.loss):
            row["spike"] = True
            self.warn_of_spike(done, report.loss)
        self.log(row)
        self.console.step(row)

    def warn_of_spike(self, step: int, loss: float) -> None:
        """At most once in `SPIKE_WARNING_STEPS` steps; the ledger marks them all."""
        if step < self.next_spike_warning:
            return
        self.next_spike_warning = step + SPIKE_WARNING_STEPS
        self.console.warn(f"step {step}: the loss jumped to {loss:.3f}")

    def record_straggler(self, step: int, slow: Slow, who: str) -> None:
        """A rank that holds up the others."""
        self.event("straggler", step, rank=slow.rank, who=who, own_s=slow.own_s, median_s=slow.median_s)
        self.console.warn(
            f"step {step}: {who} is slow: {slow.own_s:.3f} s a step for images and forward, "
            f"the median rank {slow.median_s:.3f} s"
        )

    def record_scores(self, step: int, found: dict[str, Scores]) -> None:
        """The ledger's row of an evaluation. found: "raw" and, where there is an average of the weights, "ema"."""
        epoch, scores, average = self.epoch(step), found["raw"], found.get("ema")
        row = {"kind": "eval", "step": step, "epoch": epoch, **dataclasses.asdict(scores)}
        text = f"validation loss {scores.val_loss:.4f}, top-1 {scores.val_top1:.2f} %, top-5 {scores.val_top5:.2f} %"
        if average is not None:
            own = dataclasses.asdict(average)
            row |= {key.replace("val_", "val_ema_"): value for key, value in own.items() if key != "images"}
            text += f", with averaged weights {average.val_top1:.2f} %"
        self.log(row)
        self.console.say(f"epoch {epoch:.2f}, step {step}: {text} of {scores.images:,} images")

    def alarm(self, text: str) -> None:
        """Warn, also those who only look at W&B."""
        self.console.warn(text)
        self.wandb.alert(text)

    def log(self, row: dict) -> None:
        """A row to the ledger, and to W&B, which is a view of it. Raises TransientError where the disk refuses for too
        long."""
        self.fence()
        self.ledger.append(row)
        self.wandb.log(row)
        if self.outage.note(self.ledger.refusal, row["step"]):
            self.owes_save = True
            if not self.folder.config.exists():  # the whole folder was removed
                self.folder.save_config(self.config)

    def _before_checkpoint(self) -> None:
        self.fence()
        self.ledger.sync()

    def event(self, name: str, step: int, **facts) -> None:
        """Enter into the ledger what happened to the run."""
        self.ledger.append(_event_row(name, step, **facts))

    def is_evaluated(self, step: int) -> bool:
        """Does the ledger hold an evaluation of this step? (A kill in its midst: it is done again.)"""
        return any(row["step"] == step for row in self.ledger.evaluations)

    def save(self, step: int, state: dict[str, dict], meta: dict) -> None:
        """Copy a state and write it as a checkpoint behind the training; waits for the one before it. The ledger
        reaches the disk before it does."""
        self.owes_save = False
        self.writer.wait()  # the host's copy is free again
        copy, wait = self.host_copy.take(state)
        self.writer.save(Snapshot(step, copy, meta, wait))

    def go_back(self, made: Rollback) -> None:
        """Enter that the run goes back, before it does: rows and checkpoints of later steps go."""
        self.wandb.expect_rewind(last_steps(self.folder.ledger))
        self.ledger.rewind(made.to, _event_row("rolled_back", made.at, **dataclasses.asdict(made)))
        self.writer.remove_after(made.to)
        self.spikes = Spikes(self.config.guard.spike_factor, self.ledger.losses)

    def finish(self, step: int) -> None:
        """The last step is done, scored and on the disk. Raises TransientError where its checkpoint could not be."""
        if not self.writer.wait():
            raise TransientError(f"the last checkpoint could not be written to {self.folder.checkpoints}; start again")
        self.event("finished", step)
        self.ledger.sync()
        mark_finished(self.folder, self.ledger.evaluations[-1], "finished", self.console.say)

    def report(self, step: int, device: str, stop: StopRequest) -> None:
        """The run's page, and its pictures for W&B. The run is done, and nothing here makes it fail."""
        page = write_report(self.folder.path, device, stop, self.console.say)
        if page is not None:
            self.wandb.show(sorted(page.parent.glob("pictures/*.png")), step)

    def interrupt(self, step: int, stop: StopRequest) -> None:
        """Somebody asked to stop, and all is saved. Raises TransientError where it could not be."""
        if not self.writer.wait():
            raise TransientError(f"the checkpoint could not be written to {self.folder.checkpoints} before stopping")
        reason, seconds = stop.reason or "another rank was asked", stop.seconds()
        self.event("interrupted", step, reason=reason, seconds=seconds)
        self.ledger.sync()
        self.folder.mark("interrupted", step=step, reason=reason, seconds=round(seconds, 2))
        self.console.say(
            f"interrupted ({reason}): step {step} is saved, {seconds:.1f} s after the signal; "
            "run the same command to resume"
        )

    def regroup(self, step: int) -> None:
        """All is saved, for other ranks to resume. Raises TransientError where it could not be."""
        if not self.writer.wait():
            raise TransientError(f"the checkpoint could not be written to {self.folder.checkpoints} before stopping")
        self.ledger.sync()
        self.console.say(f"step {step} is saved; the ranks start again with the nodes that joined")

    def close(self) -> None:
        """Let go of files and W&B; a checkpoint that is being written is finished first."""
        self.writer.close()
        try:
            self.ledger.close()
        except OSError as error:
            self.console.warn(f"the last rows can't be written ({error}); their steps will be done again")
        self.wandb.close()


def mark_finished(folder: RunFolder, scores: dict, verb: str, say: Callable[[str], None]) -> None:
    """The mark `finished`, from the ledger's last evaluation."""
    keys = ("step", "val_top1", "val_top5", "val_ema_top1", "val_ema_top5")
    folder.mark("finished", **{key: scores[key] for key in keys if key in scores})
    average = f", with averaged weights {scores['val_ema_top1']:.2f} %" if "val_ema_top1" in scores else ""
    say(f"{verb}: {scores['step']} steps, top-1 {scores['val_top1']:.2f} %{average}; {folder.path}")


def _event_row(name: str, step: int, **facts) -> dict:
    here = {"time": time.time(), "host": socket.gethostname(), **slurm_facts()}
    return {"kind": "event", "event": name, "step": step, **here, **facts}


def going_back(made: Rollback, path: Path | None, lr: float) -> str:
    """What is said of a rollback."""
    way = f"{lr:.4g} as learning rate" + (", in another order" if made.reshuffle else "")
    return f"going back from step {made.at} to {path or 'the beginning'}, with {way}"
