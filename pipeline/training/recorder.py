"""What rank 0 writes while a run trains: the ledger and its views, the checkpoints, the markers of the run's end."""

import dataclasses
import math
from pathlib import Path

import torch

from pipeline.config import semantic_config
from pipeline.counts import count
from pipeline.dataset.index.left_out import describe
from pipeline.errors import TransientError
from pipeline.run_paths import RunPaths, list_checkpoints
from pipeline.tracking.eval_rows import best_step, early_stop
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.ledger_rows import TRAINING_UNREADABLE, VALIDATION_UNREADABLE, last_steps
from pipeline.tracking.tensorboard_view import TensorBoardView
from pipeline.tracking.view import View
from pipeline.tracking.wandb_view import WandbView
from pipeline.training.evaluate import Evaluation
from pipeline.training.final_report import write_report
from pipeline.training.guard import Rollback, Spikes
from pipeline.training.ranks.launcher import current_launch
from pipeline.training.ranks.step_stats import StepStats
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.stragglers import Slow
from pipeline.training.run_folder.checkpoint import CheckpointWriter
from pipeline.training.run_folder.folder import event_row, mark_finished
from pipeline.training.run_folder.gpu_fault import take_gpu_fault
from pipeline.training.run_folder.outage import Outage
from pipeline.training.run_folder.set_aside import set_aside
from pipeline.training.run_folder.snapshot import HostCopy, Snapshot
from pipeline.training.setup import RunSetup, print_summary
from pipeline.training.start import needed_for_rollback, start_facts
from pipeline.training.step import TrainStep

SPIKE_WARNING_STEPS = 100
NAMED = 10  # unreadable validation images on the console; the ledger names all


class RunRecorder:
    """Ledger, its views and checkpoints of a run. Rank 0 only.

    The ledger is opened at `setup.start.own_step`: its rows of later steps are removed, as these steps will be done
    again, or belong to another way.
    """

    def __init__(self, setup: RunSetup):
        self.config, self.folder, self.plan, self.console = setup.config, setup.folder, setup.plan, setup.console
        self.confirm_lock, self.last_step = setup.confirm_lock, setup.milestones.last_step
        config, folder = setup.config, setup.folder
        settings = semantic_config(config) | {"world_size": setup.world.size}
        wandb = WandbView(config.tracking, folder.path, settings, last_steps(folder.ledger), self.console.say)
        own_step = setup.start.own_step
        given_up = any(step > own_step for step, _ in list_checkpoints(folder.checkpoints))  # damaged ones, say
        if setup.start.went_back or given_up:
            set_aside(folder, own_step, setup.start.rollbacks, self.console.warn)
        self.ledger = Ledger(folder.ledger, own_step)
        self.views: list[View] = [wandb, self.console]
        if config.tracking.tensorboard:
            paths = RunPaths(folder.path)
            self.views.append(TensorBoardView(paths.tensorboard, paths.ledger, self.console.warn))
        self.spikes = Spikes(config.guard.spike_factor, self.ledger.losses)
        self.writer = CheckpointWriter(
            folder.checkpoints,
            config.checkpoint.keep,
            protected=self._protected_steps,
            warn=self.alarm,
            before=self._before_checkpoint,
        )
        self.host_copy = HostCopy(setup.world.device, self.console.warn)
        self.outage = Outage(folder.path, 60 * config.checkpoint.outage_timeout_minutes, self.alarm)
        self.save_needed = False  # an outage has ended: no checkpoint was saved during it
        self.named: set[str] = set()  # unreadable validation images
        self.next_spike_warning = 0  # step

    def _protected_steps(self) -> set[int]:
        """Steps of the checkpoints that are never removed: the best one so far, and one that a rollback requires."""
        best = best_step(self.ledger.evaluations)
        return needed_for_rollback(self.folder.checkpoints) | (set() if best is None else {best})

    def record_start(self, setup: RunSetup) -> None:
        """The ledger's row of a start, and a summary of the run on the console."""
        self.folder.clear_marks()
        fault = take_gpu_fault(self.folder.path)
        if fault is not None:
            self.event("gpu_fault", setup.start.step, **fault)
        launch = current_launch()
        facts: dict[str, object] = {
            "world_size": setup.world.size,
            "last_step": setup.milestones.last_step,
            "hardware": setup.world.hardware,
            "torch": torch.__version__,
            "index": setup.index.fingerprint,
        }
        if launch is not None and launch.round > 1:
            facts |= {"round": launch.round, "reason": launch.reason}
        if describe(setup.index.left_out):
            facts["left_out"] = describe(setup.index.left_out)
        facts |= start_facts(setup.start, setup.config)
        self.event("started" if setup.start.path is None else "resumed", setup.start.step, **facts)

    def epoch(self, step: int) -> float:
        return step * self.plan.global_batch_size / self.plan.samples

    def record_step(self, stats: StepStats, lr: float, batch_digest: str) -> None:
        """The ledger's row of a step: row s says that s steps are done."""
        row = {
            "kind": "train",
            "step": stats.step,
            "epoch": self.epoch(stats.step),
            "loss": stats.loss,
            "top1": stats.top1,
            "lr": lr,
            "images_per_s": self.plan.global_batch_size / stats.step_s,
            "data_wait_fraction": min(1.0, stats.wait_s / stats.step_s),
            "grad_norm": stats.grad_norm,
            "batch_digest": batch_digest,
        }
        if self.config.train.precision == "fp16":
            row["loss_scale"] = stats.scale
        if not math.isfinite(stats.grad_norm):
            row["skipped"] = True
        if self.spikes.observe(stats.loss):
            row["spike"] = True
            self.warn_of_spike(stats.step, stats.loss)
        self.log(row)

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

    def record_scores(self, step: int, found: dict[str, Evaluation]) -> None:
        """The ledger's row of an evaluation. found: "raw" and, where there is an average of the weights, "ema"."""
        epoch, scores = self.epoch(step), found["raw"].scores
        average = found["ema"].scores if "ema" in found else None
        self.record_left_out(step, {name: why for part in found.values() for name, why in part.unreadable.items()})
        row = {"kind": "eval", "step": step, "epoch": epoch, **dataclasses.asdict(scores)}
        if average is not None:
            own = dataclasses.asdict(average)
            row |= {key.replace("val_", "val_ema_"): value for key, value in own.items() if key.startswith("val_")}
        self.log(row)

    def record_unreadable(self, step: int, new: dict[int, str]) -> None:
        """Training samples that could not be read, and are substituted from now on. new: sample -> its description."""
        for sample, name in new.items():
            self.console.say(f"unreadable from now on: {name}; substituted")
            self.event(TRAINING_UNREADABLE, step, file=name, sample=sample)

    def record_left_out(self, step: int, unreadable: dict[str, str]) -> None:
        """Name the validation images that could not be read, each once a start. unreadable: file -> reason."""
        new = {name: reason for name, reason in unreadable.items() if name not in self.named}
        if not new:
            return
        self.named |= new.keys()
        for name, reason in list(new.items())[:NAMED]:
            self.console.warn(f"validation image {name} can't be read ({reason}); left out of the scores")
        if len(new) > NAMED:
            self.console.warn(f"and {count(len(new) - NAMED, 'more validation image')}: see {self.folder.ledger}")
        self.event(VALIDATION_UNREADABLE, step, files=new)

    def alarm(self, text: str) -> None:
        """Warn, also those who only look at W&B."""
        for view in self.views:
            view.alert(text)

    def log(self, row: dict) -> None:
        """A row to the ledger, and to its views. Raises TransientError where the disk refuses for too
        long."""
        self.confirm_lock()
        self.ledger.append(row)
        for view in self.views:
            view.log(row)
        if self.outage.update(self.ledger.refusal, row["step"]):
            self.save_needed = True
            if not self.folder.config.exists():  # the whole folder was removed
                self.folder.save_config(self.config)

    def _before_checkpoint(self) -> None:
        self.confirm_lock()
        self.ledger.sync()

    def event(self, name: str, step: int, **facts: object) -> None:
        """Enter into the ledger what happened to the run."""
        self.ledger.append(event_row(name, step, **facts))

    def is_evaluated(self, step: int) -> bool:
        """Does the ledger hold an evaluation of this step? (A kill in the middle of it: it is done again.)"""
        return any(row["step"] == step for row in self.ledger.evaluations)

    def stops_early(self) -> str | None:
        """Why the run ends at its last evaluation; None: it goes on."""
        return early_stop(self.ledger.evaluations, self.config.train.stop_after_evals_without_gain)

    def save(self, step: int, state: dict[str, dict], meta: dict) -> None:
        """Copy a state and write it as a checkpoint behind the training; waits for the one before it. The ledger
        reaches the disk before it does."""
        self.save_needed = False
        self.writer.wait()  # the host's copy is free again
        copy, wait = self.host_copy.take(state)
        self.writer.save(Snapshot(step, copy, meta, wait))

    def record_rollback(self, rollback: Rollback, path: Path | None, lr: float) -> None:
        """Record that the run rolls back to `path` (None: step 0), before it does: rows and checkpoints of later steps
        are removed. lr: the learning rate from there on."""
        steps = last_steps(self.folder.ledger)
        for view in self.views:
            view.before_rewind(steps)
        self.ledger.rewind(rollback.to, event_row("rolled_back", rollback.at, **dataclasses.asdict(rollback)))
        for view in self.views:
            view.after_rewind()
        self.writer.remove_after(rollback.to)
        self.spikes = Spikes(self.config.guard.spike_factor, self.ledger.losses)
        order = ", in another order" if rollback.reshuffle else ""
        self.console.warn(
            f"rolling back from step {rollback.at} to {path or 'the beginning'}, with learning rate {lr:.4g}{order}"
        )

    def _require_saved(self, what: str) -> None:
        """Raises TransientError where the last save did not reach the disk. what: the checkpoint, in words."""
        if not self.writer.wait():
            raise TransientError(f"{what} could not be written to {self.folder.checkpoints} {self.writer.refusal}")

    def finish(self, step: int) -> None:
        """The last step is done, scored and on the disk. Raises TransientError where its checkpoint could not be."""
        self._require_saved("the last checkpoint")
        left = self.writer.prune()  # the last scores may have made another checkpoint the best
        if left:
            self.console.warn(left)
        reason = None if step == self.last_step else self.stops_early()
        self.event("finished", step, **({"reason": reason} if reason else {}))
        self.ledger.sync()
        mark_finished(self.folder, self.ledger.evaluations[-1], "finished", self.console.say, reason)

    def report(self, step: int, device: str, stop: StopRequest) -> None:
        """The run's page, and its pictures for the views. The run is done, and nothing here makes it fail."""
        page = write_report(self.folder.path, device, stop, self.console.say)
        if page is not None:
            for view in self.views:
                view.show(sorted(page.parent.glob("pictures/*.png")), step)

    def interrupt(self, step: int, stop: StopRequest) -> None:
        """Somebody asked to stop, and all is saved. Raises TransientError where it could not be."""
        self._require_saved("the checkpoint before stopping")
        stop.look()  # another rank may have seen the stop file first
        reason, seconds = stop.reason or "another rank was asked", stop.seconds()
        self.event("interrupted", step, reason=reason, seconds=seconds)
        self.ledger.sync()
        self.folder.mark("interrupted", step=step, reason=reason, seconds=round(seconds, 2))
        state = f"step {step} is saved" if step else "no step is done yet"
        self.console.say(
            f"interrupted ({reason}): {state}, {seconds:.1f} s after the request; run the same command to resume"
        )

    def regroup(self, step: int) -> None:
        """All is saved, for other ranks to resume. Raises TransientError where it could not be."""
        self._require_saved("the checkpoint before stopping")
        self.ledger.sync()
        self.console.say(f"step {step} is saved; the ranks start again with other nodes")

    def close(self) -> None:
        """Let go of files and views; a checkpoint that is being written is finished first."""
        self.writer.close()
        try:
            self.ledger.close()
        except OSError as error:
            self.console.warn(f"the last rows can't be written ({error}); their steps will be done again")
        for view in self.views:
            view.close()


def open_recorder(setup: RunSetup, train_step: TrainStep) -> RunRecorder:
    """The recorder of a start, with the start recorded and a summary of the run printed. Rank 0 only."""
    recorder = RunRecorder(setup)
    recorder.host_copy.reserve(train_step.state_dict())
    recorder.record_start(setup)
    print_summary(setup, train_step)
    setup.console.start(setup.start.step, setup.milestones.last_step)
    return recorder
