"""From a configuration to all that a run requires before its network is built; see `RunSetup`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import Config, semantic_config
from pipeline.counts import count
from pipeline.dataset.index.index import Index
from pipeline.loader.build import choose_loader
from pipeline.loader.plan import TrainPlan, make_train_plan
from pipeline.model.build import build_model, count_parameters
from pipeline.model.weights import start_from
from pipeline.tracking.console import Console
from pipeline.tracking.eval_rows import early_stop
from pipeline.tracking.ledger import Ledger
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.data import check_labels, open_data
from pipeline.training.milestones import Milestones
from pipeline.training.optim.ema import average_start
from pipeline.training.optim.lr_schedule import Schedule, peak_lr
from pipeline.training.optim.own import check_loss
from pipeline.training.ranks.consistency import refuse_differences
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.world import World
from pipeline.training.run_folder.best import place_of_weights
from pipeline.training.run_folder.checkpoint import load_state
from pipeline.training.run_folder.folder import RunFolder, accept_start, event_row, mark_finished, open_run_folder
from pipeline.training.run_folder.local import LocalSnapshots, local_snapshots, publish_newest
from pipeline.training.run_folder.shared_state import read_on_rank_zero
from pipeline.training.start import Start, check_begin, find_start
from pipeline.training.step import TrainStep
from pipeline.training.validate import check_classes, data_warnings, precision_warning, validate


def _nothing_to_confirm() -> None:
    """For a run folder without a lock, as in benchmarks."""


@dataclass(frozen=True)
class RunSetup:
    """What a run requires before its network is built. Made by `prepare_run`; the same on all ranks.

    Attributes:
        config: the whole configuration.
        world: this process among all ranks.
        stop: set when the run is asked to save and stop.
        console: prints on rank 0, and nothing on other ranks.
        folder: the run folder, checked and ready.
        index: the data set.
        plan: which samples each step takes.
        schedule: the learning rate of each step.
        milestones: after which steps a checkpoint or an evaluation is due, and the last step.
        classes: number of outputs of the network.
        start: the checkpoint to start from, or step 0.
        local: snapshots in this node's memory; None: `pipeline launch` did not start this process.
        confirm_lock: called by rank 0 before each write to the run folder; see `RunLock.confirm`.
    """

    config: Config
    world: World
    stop: StopRequest
    console: Console
    folder: RunFolder
    index: Index
    plan: TrainPlan
    schedule: Schedule
    milestones: Milestones
    classes: int
    start: Start
    local: LocalSnapshots | None
    confirm_lock: Callable[[], None]

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the run that saved it."""
        return {
            "semantic_config": semantic_config(self.config),
            "index_fingerprint": self.index.fingerprint,
            "classes": list(self.index.synsets),
            "world_size": self.world.size,
            "begun_from": self.start.begun_from,
            "torch": torch.__version__,
        }

    def make_train_step(self, start: Start) -> TrainStep:
        """Network and optimizer in the state of `start`, on this rank's device. Collective."""
        torch.manual_seed(self.config.train.seed)
        model = build_model(self.config.model, self.classes)
        if start.path is None:
            config, classes, say = self.config.model, self.index.synsets, self.console.say
            self.world.on_rank_zero(lambda: start_from(model, config, classes, say, place_of_weights(config)))
        with self.world.watch.collective("sending rank 0's weights to all ranks"):
            train_step = TrainStep(model, self.config, self.world, average_start(self.config, self.schedule))
        path = start.path
        if path is not None:
            train_step.load_state_dict(read_on_rank_zero(lambda: load_state(path, start.parts), self.world))
        return train_step


def prepare_run(
    config: Config, world: World, stop: StopRequest, confirm_lock: Callable[[], None] = _nothing_to_confirm
) -> RunSetup:
    """Check the configuration, open run folder and data set, and find the checkpoint to start from. Collective.

    Builds the index where it is missing, which may take hours. Raises UserError for what can't be trained, and for a
    run folder or checkpoint of a different run.
    """
    console = Console(config.tracking.print_every_s, quiet=not world.is_rank_zero)
    world.on_rank_zero(lambda: validate(config, world.size, world.device.type))
    folder: RunFolder = world.on_rank_zero(lambda: open_run_folder(config))
    if world.local_rank == 0:  # one rank a node: a network file system may show the file late on other nodes
        stop.watch(folder.stop)
    index = open_data(config.data, world, console.say, stop=stop)
    refuse_differences({"the data set's fingerprint": index.fingerprint}, world)
    classes = config.model.num_classes or index.num_classes
    check_classes(config.model, index.num_classes)
    check_labels(index, classes)
    world.on_rank_zero(lambda: check_loss(config, classes))
    plan = make_train_plan(index, config.data, config.train, config.augment)
    for warning in data_warnings(
        plan.samples, config.train.global_batch_size, index.num_classes, index.unscored_classes()
    ):
        console.warn(warning)
    if slow := precision_warning(config.train.precision, world.device.type):
        console.warn(slow)
    steps_per_epoch = plan.samples / config.train.global_batch_size
    schedule = Schedule(config.schedule, peak_lr(config.optim, config.train.global_batch_size), steps_per_epoch)
    if schedule.milestone_warning:
        console.warn(schedule.milestone_warning)
    last_step = min(schedule.total_steps, config.train.max_steps or schedule.total_steps)
    milestones = Milestones(config, plan, last_step)
    local = local_snapshots(world, console.warn)
    publish_newest(world, local, folder)
    start = world.on_rank_zero(lambda: find_start(config, folder, index.fingerprint, last_step, console.warn))
    check_begin(start, schedule, folder)
    world.on_rank_zero(lambda: accept_start(folder, config))
    return RunSetup(
        config, world, stop, console, folder, index, plan, schedule, milestones, classes, start, local, confirm_lock
    )


def already_finished(setup: RunSetup) -> bool:
    """Is the last step done and scored, or has the run stopped early? Then rank 0 says so, and there is nothing to
    train. Collective."""

    def find_scores() -> bool:
        rows = list(read_rows(setup.folder.ledger))
        evaluations = [row for row in rows if row.get("kind") == "eval"]
        if not evaluations or evaluations[-1]["step"] != setup.start.step:
            return False
        whole = setup.start.step == setup.milestones.last_step
        reason = None if whole else early_stop(evaluations, setup.config.train.stop_after_evals_without_gain)
        ended = whole or reason is not None
        step = setup.start.step
        if ended and not any(row.get("event") == "finished" and row.get("step") == step for row in rows):
            ledger = Ledger(setup.folder.ledger, step)  # killed before it was noted; `pipeline continue` asks for it
            ledger.append(event_row("finished", step, **({"reason": reason} if reason else {})))
            ledger.close()
        if ended:
            mark_finished(setup.folder, evaluations[-1], "already finished", setup.console.say, reason)
        return ended

    return setup.world.on_rank_zero(find_scores)


def print_summary(setup: RunSetup, train_step: TrainStep) -> None:
    """Print what is trained, on what, from where."""
    config, say, world = setup.config, setup.console.say, setup.world
    loader, fallen_back_from = choose_loader(config.data.loader)
    if fallen_back_from:
        setup.console.warn(fallen_back_from)
    say(f"run folder {setup.folder.path}")
    say(
        f"{config.model.name}: {count(count_parameters(train_step.model), 'parameter')}, {config.train.precision}; "
        f"{world.size} x {world.device.type}, global batch {config.train.global_batch_size}; "
        f"{count(setup.plan.samples, 'training image')} of {count(setup.index.num_classes, 'class')} by {loader}"
    )
    say("starting at step 0" if setup.start.path is None else f"resuming from {setup.start.path}")
