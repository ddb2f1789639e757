"""The training loop: a run is a pure function of (recipe, index, seed, step), so it can start at any step.

Read `Trainer.run` from top to bottom; everything it calls is named for what it does. `step` is always the number of
steps done: the batch, the learning rate and the seed of the step that comes next follow from it.
"""

import math
import time

from pipeline.errors import EXIT_OK, EXIT_REGROUP
from pipeline.loader.build import make_eval_stream, make_train_stream
from pipeline.loader.prefetch import DigestsAhead, OngoingBatches
from pipeline.loader.stream import Stream
from pipeline.training.evaluate import Evaluation, score_recalibrated, share_buffers
from pipeline.training.guard import Guard
from pipeline.training.profile import Profiler
from pipeline.training.ranks.consistency import compare_parameters
from pipeline.training.ranks.step_stats import StepStats, StepStatsExchange, Vote
from pipeline.training.ranks.stop_request import interrupted_exit_code
from pipeline.training.ranks.stragglers import OwnTime, Stragglers
from pipeline.training.ranks.translate_error import recording_gpu_faults
from pipeline.training.ranks.unreadable import Unreadable
from pipeline.training.ranks.world import Clock
from pipeline.training.recorder import RunRecorder, open_recorder
from pipeline.training.setup import RunSetup, already_finished
from pipeline.training.start import Start, check_begin, find_rollback_start
from pipeline.training.step import TrainStep, seed_step


def train(setup: RunSetup) -> int:
    """Train to the last step, or until the run is asked to stop. Collective. Returns the exit code."""
    if already_finished(setup):
        return EXIT_OK
    trainer = open_trainer(setup)
    try:
        with recording_gpu_faults(setup.config, setup.world):
            return trainer.run()
    finally:
        trainer.close()


def open_trainer(setup: RunSetup) -> "Trainer":
    """A trainer in the state of `setup.start`, with loaders and ledger open. The caller closes it. Collective."""
    config, world = setup.config, setup.world
    train_step = setup.make_train_step(setup.start)
    train_stream = make_train_stream(setup.index, setup.plan, config.data, world, applies=config.augment)
    eval_stream = make_eval_stream(setup.index, config.data, config.train.local_eval_batch_size(world.size), world)
    recorder, profiler = None, None
    if world.is_rank_zero:
        recorder = open_recorder(setup, train_step)
        if config.train.profile_steps:
            profiler = Profiler(config.train.profile_steps, setup.folder.profile, world, setup.console.say)
    return Trainer(setup, train_step, train_stream, eval_stream, recorder, profiler)


class Trainer:
    """One rank's part in a run. Made by `open_trainer`.

    Args:
        setup: the run.
        train_step: network and optimizer, in the state of `setup.start`.
        train_stream: this rank's training batches.
        eval_stream: this rank's validation batches.
        recorder: writes ledger and checkpoints; None on ranks other than 0.
        profiler: traces the first steps; None where none is asked for, and on ranks other than 0.
    """

    def __init__(
        self,
        setup: RunSetup,
        train_step: TrainStep,
        train_stream: Stream,
        eval_stream: Stream,
        recorder: RunRecorder | None,
        profiler: Profiler | None,
    ):
        self.setup, self.config, self.world, self.stop = setup, setup.config, setup.world, setup.stop
        self.plan, self.schedule, self.milestones = setup.plan, setup.schedule, setup.milestones
        self.console, self.watch, self.local = setup.console, setup.world.watch, setup.local
        self.train_step, self.train_stream, self.eval_stream = train_step, train_stream, eval_stream
        self.recorder, self.profiler = recorder, profiler
        self.batches = OngoingBatches(self.milestones.last_step)
        self.digests = DigestsAhead(self.plan)
        self.guard = Guard(self.config.guard, self.config.train.precision)
        self.step_stats = StepStatsExchange(self.world)
        self.stragglers = Stragglers(self.world.size)
        # agreed among all ranks, by their votes:
        self.stopping = self.regrouping = self.save_requested = self.snapshot_requested = False
        self.watch.detail = lambda: self.train_stream.source.slowest() or self.eval_stream.source.slowest()
        if self.local and self.world.local_rank == 0:
            self.local.reserve(train_step.state_dict())
        self.take_state_of(setup.start)

    def take_state_of(self, start: Start) -> None:
        """Set what a checkpoint holds beside the tensors of `train_step`."""
        self.step, self.saved_step = start.step, start.step if start.is_saved else -1
        self.saved_at = time.monotonic()
        self.unreadable = Unreadable(start.blacklist)
        self.guard.restore(start.rollbacks, start.last_good_step, start.step)
        self.batches.close()
        self.plan.reshuffle(self.guard.reshuffled_from())
        self.digests.clear()

    def run(self) -> int:
        """Train to the last step, or until the run is asked to stop. Returns the exit code."""
        self.stopping = self.world.any(bool(self.stop))  # asked while everything was loaded
        if not self.stopping:
            self.warm_up()
            if self.saved_step != self.step:
                self.save()  # begun with another run's checkpoint, which may go away; a rollback may lead here
        while not self.stopping:
            if self.guard.tripped is not None:
                self.roll_back()
            elif self.milestones.evaluates_at(self.step) and not self.is_evaluated():
                self.evaluate()
            elif self.step == self.milestones.last_step or self.stops_early():
                return self.finish()
            else:
                self.train_until(self.milestones.next_pause(self.step))
        return self.interrupt()

    def warm_up(self) -> None:
        """Compile, and let DistributedDataParallel lay out its buckets; leaves no trace in the state."""
        with self.watch.collective("the warm-up: a forward and backward that leave no trace"):
            self.train_step.warm_up(self.plan.size(self.step))

    def train_until(self, pause: int) -> None:
        """Train the steps up to `pause`, or until all ranks agree to stop or to roll back.

        Samples found unreadable are avoided from the next epoch on, by all ranks; until then each is read at most
        once.
        """
        epoch_start = self.plan.epoch_end(self.plan.epochs_done(self.step))
        batches = self.batches.read(self.train_stream, self.step, pause, self.unreadable.skip(epoch_start))
        clock, waiting = Clock(), OwnTime(self.world.device)
        while self.step < pause and not self.stopping and self.guard.tripped is None:
            self.watch.phase("waiting for images", self.step + 1)
            with waiting.measure():
                batch = next(batches)
            if self.recorder:
                self.digests.start(self.step)
            seed_step(self.config.train.seed, self.step, self.world.rank)
            with self.watch.collective("forward, backward and the exchange of gradients"):
                numbers = self.train_step(batch, self.lr(self.step), self.step)
            waited, forward = waiting.take(), self.train_step.own_time.take()
            self.step += 1
            self.step_stats.push(self.step, numbers, batch.ids, self.vote(), waited, clock.lap(), waited + forward)
            self.train_step.average(self.step)
            if self.profiler and not self.profiler.step(self.step):
                self.profiler = None
            self.process_step_stats(self.step_stats.due())
            if self.step % self.config.guard.compare_every_steps == 0:
                compare_parameters(self.train_step.model, self.world, self.step)
            if self.saves_now():
                self.save()
                clock.lap()
            elif self.snapshot_requested:
                self.save_snapshot()
        self.process_step_stats(self.step_stats.due(everything=True))

    def lr(self, step: int) -> float:
        """The learning rate after `step` steps: the schedule's, lowered by each rollback."""
        return self.schedule.lr(step) * self.guard.lr_factor(step)

    def vote(self) -> Vote:
        """What this rank asks of all ranks; sent with its statistics of a step."""
        if self.stop:
            return Vote.STOP
        if self.stop.regroup:
            return Vote.REGROUP
        every = self.config.checkpoint.every_minutes
        if self.world.is_rank_zero and every and time.monotonic() - self.saved_at > 60 * every:
            return Vote.SAVE
        if self.recorder and self.recorder.save_needed:
            return Vote.SAVE
        if self.world.is_rank_zero and self.local and self.local.is_due():
            return Vote.SNAPSHOT
        return Vote.NONE

    def process_step_stats(self, finished: list[StepStats]) -> None:
        """Process the statistics of all ranks: votes, unreadable samples, NaN and infinite values; write the ledger."""
        for stats in finished:
            before = stats.step - 1
            planned, *_ = self.plan.samples_at(before, 0, self.plan.global_batch_size)
            ids = stats.ids.numpy()
            new = self.unreadable.observe(stats.step, planned, ids)
            if self.recorder:
                self.recorder.record_unreadable(stats.step, {i: self.train_stream.source.describe(i) for i in new})
            self.stopping |= stats.vote >= Vote.REGROUP
            self.regrouping |= stats.vote == Vote.REGROUP
            self.save_requested |= stats.vote == Vote.SAVE
            self.snapshot_requested |= stats.vote == Vote.SNAPSHOT
            if self.recorder:
                self.recorder.record_step(stats, self.lr(before), self.digests.take(before, ids))
            warning = self.guard.observe(stats)
            if warning:
                self.console.warn(warning)
            slow = self.stragglers.observe(stats.own_s)
            if slow and self.recorder:
                self.recorder.record_straggler(stats.step, slow, self.watch.names[slow.rank])

    # --- evaluation

    def is_evaluated(self) -> bool:
        """Does the ledger hold scores of this step? Collective."""
        return self.world.any(self.recorder is not None and self.recorder.is_evaluated(self.step))

    def evaluate(self) -> None:
        """Score the weights and their average. Nothing is recorded if the run is asked to stop meanwhile."""
        if self.saved_step != self.step:
            self.save()  # the best checkpoint must be one that was scored
        if self.config.evaluation.recalibrate_batches:
            self.batches.close()  # which reads training batches, too
        found: dict[str, Evaluation] = {}
        for name, network in self.train_step.networks.items():
            scores = score_recalibrated(
                network, self.setup, self.train_stream, self.eval_stream, self.step, self.unreadable.skip()
            )
            if scores is None:
                self.stopping = True
                return
            found[name] = scores
        if self.recorder:
            self.recorder.record_scores(self.step, found)

    def stops_early(self) -> bool:
        """Have too many evaluations passed without a gain? Collective."""
        asked = self.config.train.stop_after_evals_without_gain is not None and self.milestones.evaluates_at(self.step)
        return asked and self.world.any(self.recorder is not None and self.recorder.stops_early() is not None)

    # --- checkpoints

    def saves_now(self) -> bool:
        """Is a checkpoint due after this step? The same answer on all ranks. Never among bad steps."""
        due = self.milestones.saves_at(self.step) or self.save_requested
        return due and self.step != self.saved_step and self.guard.last_good_step is None

    def save(self) -> None:
        """Copy the state of this step; rank 0 writes it in the background, after the ledger's rows up to this step."""
        self.process_step_stats(self.step_stats.due(everything=True))
        compare_parameters(self.train_step.model, self.world, self.step)
        self.saved_step, self.saved_at, self.save_requested = self.step, time.monotonic(), False
        if self.recorder:
            self.watch.phase("saving")
            self.recorder.save(self.step, self.train_step.state_dict(), self.meta())

    def save_snapshot(self) -> None:
        """Copy the state of this step to each node's memory, for the ranks that resume when a node is lost."""
        self.process_step_stats(self.step_stats.due(everything=True))  # votes for this snapshot that were cast since
        self.snapshot_requested = False
        if self.guard.last_good_step is not None:
            return
        compare_parameters(self.train_step.model, self.world, self.step)
        with self.watch.collective("the exchange of buffers"):
            for network in self.train_step.networks.values():  # rank 0's count; its node may be the one that is lost
                share_buffers(network, self.world)
        if self.local and self.world.local_rank == 0:
            self.watch.phase("a local snapshot")
            self.local.save(self.step, self.train_step.state_dict(), self.meta())

    def meta(self) -> dict:
        """What a checkpoint holds beside its tensors."""
        return {**self.setup.identity(), **self.unreadable.state(), **self.guard.state()}

    def roll_back(self) -> None:
        """Too many bad steps in a row: restore the last checkpoint before them, and resume from there with another
        learning rate or order."""
        start = self.world.on_rank_zero(self.record_rollback)
        del self.train_step  # its memory is needed again
        self.train_step = self.setup.make_train_step(start)
        self.take_state_of(start)
        self.warm_up()

    def record_rollback(self) -> Start:
        """Choose the checkpoint, and record the rollback before it takes place. Rank 0 only."""
        assert self.recorder is not None
        self.recorder.writer.wait()
        found = find_rollback_start(self.setup.folder, self.guard, self.console.warn)
        check_begin(found, self.schedule, self.setup.folder)
        rollback = self.guard.roll_back(self.step, found.step)
        self.recorder.record_rollback(rollback, found.path, self.lr(rollback.to))
        return Start(found.path, found.meta, self.guard.rollbacks)

    # --- the end

    def finish(self) -> int:
        """The last step is done and scored. Returns the exit code."""
        if self.recorder:
            self.recorder.finish(self.step)
            self.watch.phase("the report", limit_s=math.inf)
            if self.config.tracking.report:
                self.recorder.report(self.step, self.world.device.type, self.stop)
        return EXIT_OK

    def interrupt(self) -> int:
        """The run is asked to stop: save what is not saved yet. Returns the exit code."""
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
        """Close loaders, ledger and console."""
        if self.profiler:
            self.profiler.close()
        if self.local:
            self.local.close()
        self.batches.close()
        self.digests.close()
        self.train_stream.close()
        self.eval_stream.close()
        if self.recorder:
            self.recorder.close()
        self.console.close()
