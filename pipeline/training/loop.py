"""The training loop: a run is a pure function of (recipe, index, seed, step), so it can begin at any step.

Read `Trainer.run` from top to bottom; everything it calls is named for what it does.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from pipeline.config import Config, semantic_config
from pipeline.dataset.index.index import Index
from pipeline.errors import EXIT_OK, EXIT_REGROUP, UserError
from pipeline.loader.build import choose_loader, make_eval_stream, make_train_plan, make_train_stream
from pipeline.model.build import build_model, count_parameters
from pipeline.model.weights import start_from
from pipeline.tracking.console import Console
from pipeline.tracking.ledger import read_rows
from pipeline.training.data import check_labels, open_data
from pipeline.training.evaluate import Scores, evaluate
from pipeline.training.guard import Guard
from pipeline.training.optim.lr_schedule import Schedule, peak_lr
from pipeline.training.profile import Profiler
from pipeline.training.ranks.consistency import compare_parameters, refuse_differences
from pipeline.training.ranks.launcher import current_launch
from pipeline.training.ranks.step_stats import StepStats, StepStatsExchange, Vote
from pipeline.training.ranks.stop_request import StopRequest, interrupted_exit_code
from pipeline.training.ranks.stragglers import Stragglers
from pipeline.training.ranks.world import Clock, World
from pipeline.training.recalibrate import keeping_buffers, recalibrate
from pipeline.training.recorder import RunRecorder, going_back, mark_finished
from pipeline.training.run_folder.checkpoint import load_state
from pipeline.training.run_folder.folder import RunFolder, open_run_folder
from pipeline.training.run_folder.local import local_snapshots, publish_newest
from pipeline.training.start import Start, find_start, find_way_back
from pipeline.training.step import TrainStep, seed_step
from pipeline.training.validate import check_classes, validate


class Trainer:
    """One rank's part in a run.

    Args:
        config: the whole configuration.
        world: this process among all.
        stop: set when somebody asks the run to save and go.
    """

    def __init__(self, config: Config, world: World, stop: StopRequest):
        self.config, self.world, self.stop = config, world, stop
        self.watch = world.watch
        self.console = Console(config.tracking.print_every_s, quiet=not world.is_rank_zero)
        world.on_rank_zero(lambda: validate(config, world.size, world.device.type))
        self.folder: RunFolder = world.on_rank_zero(lambda: open_run_folder(config))
        if world.local_rank == 0:  # one a node: a network file system may show it late on all nodes but its writer's
            stop.watch(self.folder.stop)
        self.index: Index = open_data(config.data, world, self.console.say)
        refuse_differences({"the data set's fingerprint": self.index.fingerprint}, world)
        self.plan = make_train_plan(self.index, config.data, config.train, config.augment)
        self.schedule = Schedule(
            config.schedule,
            peak_lr(config.optim, config.train.global_batch_size),
            self.plan.samples / config.train.global_batch_size,
        )
        self.last_step = min(self.schedule.total_steps, config.train.max_steps or self.schedule.total_steps)
        self.classes = config.model.num_classes or self.index.num_classes
        check_classes(config.model, self.index.num_classes)
        check_labels(self.index, self.classes)
        self.guard = Guard(config.guard, config.train.precision)
        self.step_stats = StepStatsExchange(world)
        self.stragglers = Stragglers(world.size)
        self.blacklist: dict[int, int] = {}  # unreadable sample -> the step that met it
        self.recorder: RunRecorder | None = None  # rank 0's
        self.profiler: Profiler | None = None  # rank 0's
        self.fence: Callable[[], None] = lambda: None  # called by rank 0 before it writes; see RunLock.confirm
        self.step = 0  # steps done
        self.asked_to_stop = self.asked_to_save = self.regrouping = False  # agreed among all ranks
        self.asked_for_snapshot = False  # agreed, too
        self.local = local_snapshots(world, self.console.warn)  # of this node; None: there are none

    def run(self) -> int:
        """Train to the end, or until somebody asks to stop. Returns the exit code."""
        publish_newest(self.world, self.local, self.folder, self.console.say)
        self.restore(self.world.on_rank_zero(self.find_start))
        if self.world.on_rank_zero(self.was_finished):
            return EXIT_OK
        self.open()
        self.asked_to_stop = self.world.any(bool(self.stop))  # while all was being loaded
        if not self.asked_to_stop:
            self.warm_up()
        try:
            while not self.asked_to_stop:
                if self.guard.tripped is not None:
                    self.roll_back()
                elif self.evaluates_at(self.step) and not self.is_evaluated():
                    self.evaluate()
                elif self.step == self.last_step:
                    return self.finished()
                else:
                    self.train_until(self.next_pause())
            return self.interrupted()
        finally:
            self.close()

    def warm_up(self) -> None:
        with self.watch.collective("the first forward and backward, which leave no trace"):
            self.train_step.warm_up(self.plan.size(self.step))

    def next_pause(self) -> int:
        """The step at which the loader starts anew (an epoch's end) or an evaluation is due."""
        epoch_end = self.plan.epoch_end(self.plan.epochs_done(self.step) + 1)
        pause = min(epoch_end, self.last_step)
        return next((step for step in range(self.step + 1, pause) if self.evaluates_at(step)), pause)

    def train_until(self, pause: int) -> None:
        """Train the steps up to `pause`, or until all ranks agree to stop or to go back.

        Samples found unreadable are avoided from the next epoch on, by all ranks alike; until then each is met at most
        once.
        """
        epoch_start = self.plan.epoch_end(self.plan.epochs_done(self.step))
        skip = frozenset(sample for sample, step in self.blacklist.items() if step < epoch_start)
        batches = self.train_stream.batches(self.step, pause, skip)
        clock = Clock()
        while self.step < pause and not self.asked_to_stop and self.guard.tripped is None:
            self.watch.phase("waiting for images", self.step + 1)
            batch = next(batches)
            waited = clock.peek()
            seed_step(self.config.train.seed, self.step, self.world.rank)
            with self.watch.collective("forward, backward and the exchange of gradients"):
                numbers = self.train_step(batch, self.lr(self.step), self.step)
            own = waited + self.train_step.own_time.take()
            self.step_stats.push(self.step, numbers, batch.ids, self.vote(), waited, clock.lap(), own)
            self.step += 1
            self.train_step.average(self.step)
            if self.profiler and not self.profiler.step(self.step):
                self.profiler = None
            self.process_step_stats(self.step_stats.due())
            if self.step % self.config.guard.compare_every_steps == 0:
                compare_parameters(self.model, self.world, self.step)
            if self.saves_at(self.step):
                self.save()
                clock.lap()
            elif self.asked_for_snapshot:
                self.save_locally()
        batches.close()
        self.process_step_stats(self.step_stats.due(everything=True))

    def lr(self, step: int) -> float:
        """The learning rate of a step, lowered wherever the run went back."""
        return self.schedule.lr(step) * self.guard.lr_factor(step)

    def vote(self) -> Vote:
        """What this rank asks of all, with its report of this step."""
        if self.stop:
            return Vote.STOP
        if self.stop.regroup:
            return Vote.REGROUP
        every = self.config.checkpoint.every_minutes
        if self.world.is_rank_zero and every and time.monotonic() - self.saved_at > 60 * every:
            return Vote.SAVE
        if self.recorder and self.recorder.owes_save:
            return Vote.SAVE
        if self.world.is_rank_zero and self.local and self.local.is_due():
            return Vote.SNAPSHOT
        return Vote.NONE

    def process_step_stats(self, reports: list[StepStats]) -> None:
        """Process what all ranks reported: votes, unreadable samples, NaN and infinite values, rows of the ledger."""
        for report in reports:
            planned, *_ = self.plan.samples_at(report.step, 0, self.plan.global_batch_size)
            ids = report.ids.numpy()
            for sample in planned[planned != ids].tolist():
                if sample not in self.blacklist:
                    self.blacklist[sample] = report.step
                    self.console.say(
                        f"unreadable from now on: {self.train_stream.source.describe(sample)}; substituted"
                    )
            self.asked_to_stop |= report.vote >= Vote.REGROUP
            self.regrouping |= report.vote == Vote.REGROUP
            self.asked_to_save |= report.vote == Vote.SAVE
            self.asked_for_snapshot |= report.vote == Vote.SNAPSHOT
            if self.recorder:
                self.recorder.record_step(report, ids, self.lr(report.step))
            warning = self.guard.note(report)
            if warning:
                self.console.warn(warning)
            slow = self.stragglers.note(report.own_s)
            if slow and self.recorder:
                self.recorder.record_straggler(report.step + 1, slow, self.watch.names[slow.rank])

    # --- evaluation

    def evaluates_at(self, step: int) -> bool:
        """Is an evaluation due after `step` steps?"""
        every = self.config.train.eval_every_epochs * self.plan.samples / self.plan.global_batch_size  # steps
        return step > 0 and (step == self.last_step or math.ceil(step // every * every) == step)

    def is_evaluated(self) -> bool:
        return self.world.any(self.recorder is not None and self.recorder.is_evaluated(self.step))

    def evaluate(self) -> None:
        """Score the weights, and their average, on the validation set; nothing is recorded if somebody asks to stop
        meanwhile."""
        if self.saved_step != self.step:
            self.save()  # the best checkpoint must be one that was scored
        found = {}
        for name, network in self.train_step.networks.items():
            found[name] = self.score(network)
            if found[name] is None:
                self.asked_to_stop = True
                return
        if self.recorder:
            self.recorder.record_scores(self.step, found)

    def score(self, network: nn.Module) -> Scores | None:
        """The scores of a network; its buffers are afterwards what they were."""
        settings, precision = self.config.evaluation, self.config.train.precision
        at_once = self.config.train.local_micro_batch_size(self.world.size)
        last = range(max(0, self.step - settings.recalibrate_batches), self.step)
        with keeping_buffers(network):
            if settings.recalibrate_batches:
                skip = frozenset(self.blacklist)
                if not recalibrate(network, self.train_stream, last, skip, self.world, precision, self.stop, at_once):
                    return None
            stream, flip = self.eval_stream, settings.flip
            evaluation = evaluate(network, stream, self.world, precision, self.stop, self.classes, flip)
        return evaluation and evaluation.scores

    # --- saving and restoring

    def saves_at(self, step: int) -> bool:
        """Is a checkpoint due after `step` steps? The same answer on all ranks."""
        settings = self.config.checkpoint
        at_epoch_end = settings.every_epoch and step == self.plan.epoch_end(self.plan.epochs_done(step))
        at_multiple = settings.every_steps is not None and step % settings.every_steps == 0
        due = at_epoch_end or at_multiple or self.asked_to_save or step == self.last_step
        return due and step != self.saved_step and self.guard.bad_since is None

    def save(self) -> None:
        """Snapshot this step; rank 0 writes it behind the training. The ledger reaches the disk before it does."""
        self.process_step_stats(self.step_stats.due(everything=True))
        compare_parameters(self.model, self.world, self.step)
        self.saved_step, self.saved_at, self.asked_to_save = self.step, time.monotonic(), False
        if self.recorder is None:
            return
        self.watch.phase("saving")
        self.recorder.save(self.step, self.train_step.state_dict(), self.meta())

    def save_locally(self) -> None:
        """Leave a snapshot of this step in the memory of each node, for ranks that go on when a node is lost."""
        self.asked_for_snapshot = False
        if self.guard.bad_since is not None:
            return
        compare_parameters(self.model, self.world, self.step)
        if self.local and self.world.local_rank == 0:
            self.watch.phase("a local snapshot")
            self.local.save(self.step, self.train_step.state_dict(), self.meta())

    def meta(self) -> dict:
        """What a checkpoint says beside its tensors."""
        return {
            "semantic_config": semantic_config(self.config),
            "index_fingerprint": self.index.fingerprint,
            "classes": list(self.index.synsets),
            "blacklist": [list(item) for item in sorted(self.blacklist.items())],
            "world_size": self.world.size,
            "torch": torch.__version__,
            **self.guard.state(),
        }

    def find_start(self) -> Start:
        return find_start(self.config, self.folder, self.guard, self.index.fingerprint, self.console.warn)

    def restore(self, start: Start) -> None:
        """Go to a checkpoint, or the beginning."""
        self.resumed_from, self.guard.rollbacks = start.path, start.rollbacks
        self.plan.reshuffle(self.guard.reshuffled_from())
        torch.manual_seed(self.config.train.seed)
        self.train_step = None  # its memory is needed again
        self.model = build_model(self.config.model, self.classes)
        if self.resumed_from is None:
            # TrainStep sends rank 0's weights to all ranks.
            self.world.on_rank_zero(lambda: start_from(self.model, self.config.model))
        with self.watch.collective("giving the weights to all"):
            self.train_step = TrainStep(self.model, self.config, self.world, self.schedule.warmup_steps)
        if self.resumed_from is not None:
            parts = [name.removesuffix(".pt") for name in start.meta["files"]]
            self.train_step.load_state_dict(load_state(self.resumed_from, parts))
        self.blacklist = dict(map(tuple, start.meta.get("blacklist", [])))
        self.guard.bad_since, self.guard.tripped = start.meta.get("bad_since"), None
        self.step = start.meta.get("step", 0)
        if self.step > self.last_step:
            raise UserError(
                f"{self.resumed_from} is at step {self.step}, past the end at {self.last_step}; "
                "raise --train.max_steps, or give another --run_dir"
            )
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def roll_back(self) -> None:
        """Too many bad steps in a row: go back to the last checkpoint before them, and on from there another way."""
        self.restore(self.world.on_rank_zero(self.go_back))
        self.warm_up()

    def go_back(self) -> Start:
        """Enter into the books that the run goes back, and where to, before it does. Rank 0 only."""
        self.recorder.writer.wait()
        path, meta = find_way_back(self.folder, self.guard, self.console.warn)
        made = self.guard.go_back(self.step, meta.get("step", 0))
        self.recorder.go_back(made)
        self.console.warn(going_back(made, path, self.lr(made.to)))
        return Start(path, meta, self.guard.rollbacks)

    # --- beginning and end

    def was_finished(self) -> bool:
        """Was there nothing left to do? Then say so. Rank 0 only."""
        scored = {row["step"]: row for row in read_rows(self.folder.ledger) if row.get("kind") == "eval"}
        if self.step < self.last_step or self.step not in scored:
            return False
        mark_finished(self.folder, scored[self.step], "already finished", self.console.say)
        return True

    def open(self) -> None:
        """The loaders of every rank; rank 0's books, and what it says at the start."""
        data, world = self.config.data, self.world
        eval_batch = self.config.train.local_eval_batch_size(world.size)
        self.train_stream = make_train_stream(self.index, self.plan, data, world)
        self.eval_stream = make_eval_stream(self.index, data, eval_batch, world)
        if self.local and world.local_rank == 0:
            self.local.reserve(self.train_step.state_dict())
        self.watch.detail = lambda: self.train_stream.source.slowest() or self.eval_stream.source.slowest()
        if not world.is_rank_zero:
            return
        self.recorder = RunRecorder(self.config, self.folder, self.plan, self.console, self.step, world)
        self.recorder.fence = self.fence
        self.recorder.host_copy.reserve(self.train_step.state_dict())
        name = "started" if self.resumed_from is None else "resumed"
        facts = {"last_step": self.last_step, "hardware": world.hardware, "torch": torch.__version__}
        launch = current_launch()
        if launch is not None and launch.round > 1:
            facts |= {"round": launch.round, "reason": launch.reason}
        self.recorder.event(name, self.step, world_size=world.size, **facts)
        self.introduce()
        if self.config.train.profile_steps:
            self.profiler = Profiler(self.config.train.profile_steps, self.folder.profile, world, self.console.say)
        self.console.start(self.step, self.last_step)

    def introduce(self) -> None:
        """Say what is trained, on what, from where."""
        say, world = self.console.say, self.world
        loader, fallen_back_from = choose_loader(self.config.data.loader)
        if fallen_back_from:
            self.console.warn(fallen_back_from)
        say(f"run folder {self.folder.path}")
        say(
            f"{self.config.model.name}: {count_parameters(self.model):,} parameters, {self.config.train.precision}; "
            f"{world.size} x {world.device.type}, global batch {self.config.train.global_batch_size}; "
            f"{self.plan.samples:,} training images of {self.index.num_classes} classes by {loader}"
        )
        say(f"resuming from {self.resumed_from}" if self.resumed_from else "starting at step 0")

    def finished(self) -> int:
        """The last step is done and scored."""
        if self.recorder:
            self.recorder.finish(self.step)
            self.watch.phase("the report", limit_s=math.inf)
            if self.config.tracking.report:
                self.recorder.report(self.step, self.world.device.type, self.stop)
        return EXIT_OK

    def interrupted(self) -> int:
        """Somebody asked to stop: save what there is, say so, and go."""
        if self.saved_step != self.step:
            self.save()
        if self.regrouping and not self.world.any(bool(self.stop)):
            if self.recorder:
                self.recorder.regroup(self.step)
            return EXIT_REGROUP
        if self.recorder:
            self.recorder.interrupt(self.step, self.stop)
        return interrupted_exit_code()

    def close(self) -> None:
        """Let go of loaders and books."""
        if self.profiler:
            self.profiler.close()
        if self.local:
            self.local.close()
        self.train_stream.close()
        self.eval_stream.close()
        if self.recorder:
            self.recorder.close()
        self.console.close()
