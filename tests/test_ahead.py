"""What is made ready ahead of a step, and handed over no later than it is there."""

import contextlib
import threading
import time

import numpy as np
import pytest
import runs
import torch

from pipeline.config import TrainConfig
from pipeline.loader import plan as plans
from pipeline.loader import prefetch
from pipeline.loader.permutations import Permutations
from pipeline.loader.plan import TrainPlan
from pipeline.loader.prefetch import DigestsAhead, OngoingBatches
from pipeline.training import loop
from pipeline.training.ranks.step_stats import StepStatsExchange, Vote
from pipeline.training.ranks.stragglers import OwnTime
from pipeline.training.ranks.world import start_world
from pipeline.training.step import TrainStep


def make_plan(samples: int = 40, batch: int = 8) -> TrainPlan:
    sides = np.full(samples, 64)
    return TrainPlan(sides, sides, batch, seed=3)


class Source:
    """A stream of step numbers that writes down what is asked of it."""

    def __init__(self):
        self.log = []

    def batches(self, start, stop, skip=frozenset()):
        self.log.append(("open", start, stop, skip))
        try:
            for step in range(start, stop):
                self.log.append(step)
                yield step
        finally:
            self.log.append("closed")


def take(batches: OngoingBatches, source: Source, start: int, stop: int, skip=frozenset()) -> list:
    reading = batches.read(source, start, stop, skip)
    return [next(reading) for _ in range(start, stop)]


def test_the_loader_reads_on_over_pauses_until_other_samples_are_left_out():
    source, batches = Source(), OngoingBatches(9)
    assert take(batches, source, 0, 3) == [0, 1, 2] and take(batches, source, 3, 5) == [3, 4]
    assert source.log == [("open", 0, 9, frozenset()), 0, 1, 2, 3, 4]
    assert take(batches, source, 5, 6, frozenset([7])) == [5]
    assert source.log[6:] == ["closed", ("open", 5, 9, frozenset([7])), 5]
    assert take(batches, source, 2, 4, frozenset([7])) == [2, 3]  # the run went back
    assert source.log[9:11] == ["closed", ("open", 2, 9, frozenset([7]))]
    assert take(batches, source, 4, 12, frozenset([7]))[-1] == 11  # beyond the end, as benchmarks ask
    batches.close()
    assert source.log[-1] == "closed" and take(batches, source, 12, 13) == [12]


def test_an_order_is_computed_once_and_the_next_one_in_advance():
    made, gate = [], threading.Event()

    def make(number):
        made.append((number, threading.current_thread().name))
        assert gate.wait(20)
        return np.array([number])

    permutations = Permutations(make)
    permutations.prepare(1)
    permutations.prepare(1)
    asking = threading.Thread(target=permutations, args=(1,))
    asking.start()
    gate.set()
    asking.join(20)
    assert permutations(1).tolist() == [1] and made == [(1, "order")]
    for number in (2, 3, 4, 1):
        assert permutations(number).tolist() == [number]
    assert [number for number, _ in made] == [1, 2, 3, 4, 1]  # three are kept


def test_a_failure_of_an_order_reaches_who_asks_and_the_next_gets_it():
    orders = [MemoryError(), np.array([7])]

    def make(number):
        if isinstance(orders[0], Exception):
            raise orders.pop(0)
        return orders[0]

    permutations = Permutations(make)
    with pytest.raises(MemoryError):
        permutations(1)
    assert permutations(1).tolist() == [7]


def test_the_next_epochs_order_is_begun_with_before_its_border(monkeypatch):
    monkeypatch.setattr(plans, "ORDER_AHEAD_STEPS", 2)
    plan, asked = make_plan(), []
    monkeypatch.setattr(plan.permutation, "prepare", asked.append)
    for step in range(10):
        plan.prepare_order(step)
    assert asked == [1, 1, 2, 2]  # at steps 3, 4, 8 and 9, of 5 an epoch


def test_digests_are_computed_by_another_thread_and_are_the_same():
    plan = make_plan()
    expected = [plan.digest(step, plan.samples_at(step, 0, 8)[0]) for step in range(12)]
    others = [ids := plan.samples_at(5, 0, 8)[0].copy()]
    others[0][2] = (ids[2] + 1) % 40  # a substitute
    of_substitute = plan.digest(5, others[0])
    ahead, real, threads = DigestsAhead(plan), plan.digest, []
    plan.digest = lambda *arguments: threads.append(threading.current_thread().name) or real(*arguments)
    for step in range(12):
        ahead.start(step)
        ids = others[0] if step == 5 else plan.samples_at(step, 0, 8)[0]
        assert ahead.take(step, ids) == (of_substitute if step == 5 else expected[step])
    assert [name.startswith("digest") for name in threads].count(False) == 1  # the substitute's
    ahead.start(3)
    ahead.clear()
    plan.reshuffle([1])
    assert ahead.take(3, plan.samples_at(3, 0, 8)[0]) == real(3, plan.samples_at(3, 0, 8)[0]) != expected[3]
    ahead.close()


def test_a_batch_for_a_gpu_is_handed_over_before_the_next_is_fetched(monkeypatch):
    """With a stand-in for CUDA's streams, which run nothing: only the order of calls is looked at."""
    log = []

    class Stream:
        def __init__(self, *_):
            pass

        def wait_event(self, event):
            log.append("wait")

    class Event:
        def record(self):
            log.append("record")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())

    def batches():
        for number in range(3):
            log.append(f"fetch {number}")
            yield number

    def augment(number):
        log.append(f"augment {number}")
        return number

    for number in prefetch.prefetch_to_device(batches(), torch.device("cuda", 0), augment):
        log.append(f"step {number}")
    order = ("fetch", "augment", "record", "wait", "step")  # what is recorded is waited for: the augmentation as well
    one = [what if what in ("record", "wait") else f"{what} {{}}" for what in order]
    assert log == [what.format(number) for number in range(3) for what in one] + ["record"]


def test_the_exchange_of_statistics_is_waited_for_when_it_is_read(monkeypatch):
    world, log = start_world(TrainConfig(device="cpu")), []
    real = torch.distributed.all_gather_into_tensor

    class Work:
        def __init__(self, work, step):
            self.work, self.step = work, step

        def wait(self):
            log.append(f"wait {self.step}")
            self.work.wait()

    def gather(everyone, mine, async_op=False):
        log.append(f"gather {int(mine[8])}")
        return Work(real(everyone, mine, async_op=async_op), int(mine[8]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    exchange, seen = StepStatsExchange(world, lag=2), []
    try:
        for step in range(4):
            ids = torch.tensor([step, step + 1])
            exchange.push(step, torch.tensor([0.5, 1.0, 2.0, 1.0]), ids, Vote.NONE, 0.1, 0.2)
            seen += exchange.due()
        seen += exchange.due(everything=True)
    finally:
        world.close()
    assert log == ["gather 0", "gather 1", "gather 2", "wait 0", "gather 3", "wait 1", "wait 2", "wait 3"]
    assert [(stats.step, stats.ids.tolist()) for stats in seen] == [(step, [step, step + 1]) for step in range(4)]


class FakeEvent:
    """A stand-in for torch.cuda.Event: `now` is the GPU's clock when it is recorded, in ms."""

    now = 0.0
    done = True

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def query(self):
        return FakeEvent.done

    def elapsed_time(self, other):
        return other.at - self.at


def test_waiting_for_images_on_a_gpu_is_what_the_gpu_has_nothing_to_do_for(monkeypatch):
    """The host may wait as long as it likes while the GPU has work; what comes between two steps besides, such as an
    evaluation, does not count. The GPU's clock is read only when it is there."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    waiting, found = OwnTime(torch.device("cuda", 0)), []
    for begun, ended, done in [(0, 0, True), (100, 150, False), (9000, 9000, True)]:
        FakeEvent.now, FakeEvent.done = begun, done
        with waiting.measure():
            FakeEvent.now = ended
        found.append(waiting.take())
    assert found == pytest.approx([0, 0, 0.05])


def test_only_waiting_for_images_counts_as_that(root, tmp_path, monkeypatch):
    """Not what a step has besides: here the average of the weights takes most of the time."""
    monkeypatch.setattr(TrainStep, "average", lambda self, step: time.sleep(1))
    small = ["--model.name", "shufflenet_v2_x0_5", "--model.zero_init_residual", "false"]
    runs.call(root, tmp_path / "run", *small, "--train.max_steps", "3")
    shares = [row["data_wait_fraction"] for row in runs.rows(tmp_path / "run", "train")]
    assert len(shares) == 3 and max(shares[1:]) < 0.25


def test_one_vote_for_a_snapshot_gives_one(root, tmp_path, monkeypatch):
    """On a GPU votes are read two steps later: those cast meanwhile, for the same snapshot, made two more."""

    class Snapshots:
        def __init__(self):
            self.steps = []

        def is_due(self):
            return not self.steps

        def save(self, step, state, meta):
            self.steps.append(step)

        def reserve(self, state):
            pass

        def close(self):
            pass

    snapshots = Snapshots()
    monkeypatch.setattr("pipeline.training.setup.local_snapshots", lambda *_: snapshots)
    monkeypatch.setattr(loop, "StepStatsExchange", lambda world: StepStatsExchange(world, lag=2))
    small = ["--model.name", "shufflenet_v2_x0_5", "--model.zero_init_residual", "false"]
    runs.call(root, tmp_path / "run", *small, "--train.max_steps", "6")
    assert snapshots.steps == [3]
