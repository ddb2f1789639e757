"""Who reads a batch: one thread while batches are in time, all threads once somebody waits."""

import threading
import time

import numpy as np
import pytest
import xxhash

from pipeline.config import DataConfig, TrainConfig
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.errors import TransientError
from pipeline.loader.build import make_train_stream
from pipeline.loader.plan import make_train_plan
from pipeline.loader.source import Source
from pipeline.rank_info import RankInfo

COUNT, BATCH = 96, 8
DATA = DataConfig(loader="reference", image_size=16, val_size=16, val_resize=18, threads=1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("read-ahead") / "data"
    generate_tree(root, Settings(classes=2, train_per_class=COUNT // 2, val_per_class=2, size=24, oddities=0))
    return build_index(root)


class Watched(Source):
    """Notes which thread reads which sample. The `hold`-th read waits for `released`; `all_read` is set with the
    `wanted`-th."""

    def __init__(self, split, threads=4):
        super().__init__(split, threads)
        self.readers: dict[int, str] = {}
        self.hold = self.wanted = 0
        self.held, self.released, self.all_read = threading.Event(), threading.Event(), threading.Event()

    def _read(self, row):
        self.readers[row.sample_id] = threading.current_thread().name
        if len(self.readers) == self.wanted:
            self.all_read.set()
        if len(self.readers) == self.hold:
            self.held.set()
            assert self.released.wait(60)
        return super()._read(row)


@pytest.fixture
def source(index):
    watched = Watched(index.splits["train"])
    yield watched
    watched.released.set()
    watched.close()


def test_a_batch_in_time_is_read_by_the_thread_that_asks(source):
    read = source.read_batch(np.arange(BATCH))
    assert [len(data) for data in read] == source.split.records["size"][:BATCH].tolist()
    assert set(source.readers.values()) == {threading.current_thread().name}


def test_the_others_read_on_while_a_sample_of_a_late_batch_hangs(source):
    source.hold, source.wanted = 4, BATCH
    found = []
    reading = threading.Thread(target=lambda: found.append(source.read_batch(np.arange(BATCH))))
    reading.start()
    assert source.held.wait(60)
    assert set(source.readers) == {0, 1, 2, 3}, "alone, in order"
    source.threads.hurry(more=False)
    assert source.all_read.wait(60), "the others are read while one hangs"
    source.released.set()
    reading.join(60)
    (read,) = found
    assert [xxhash.xxh3_64_intdigest(data) for data in read] == source.split.records["digest"][:BATCH].tolist()
    source.readers.clear()
    source.read_batch(np.arange(BATCH, 2 * BATCH))
    assert set(source.readers.values()) == {threading.current_thread().name}, "the next is in time again"


def test_after_a_late_batch_some_are_read_by_all(source, monkeypatch):
    together = threading.Barrier(2)  # two threads read at the same time, or nothing is read

    def read(row):
        together.wait(60)
        return Source._read(source, row)

    monkeypatch.setattr(source, "_read", read)
    source.threads.hurry(more=True)
    assert len(source.read_batch(np.arange(BATCH))) == BATCH


def test_an_error_of_a_helper_ends_the_batch(source, monkeypatch):
    failed = threading.Event()

    def read(row):
        if threading.current_thread().name.startswith("read"):
            failed.set()
            raise TransientError("data root is gone")
        assert failed.wait(60)
        return Source._read(source, row)

    monkeypatch.setattr(source, "_read", read)
    source.threads.hurry(more=True)
    with pytest.raises(TransientError, match="gone"):
        source.read_batch(np.arange(BATCH))


@pytest.fixture
def stream(index, source):
    data = DATA.resolve()
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=BATCH))
    made = make_train_stream(index, plan, data, RankInfo())
    made.source.close()
    made.source = source
    yield made
    source.released.set()
    made.close()


def test_a_stream_that_waits_for_a_batch_has_it_read_by_all(stream, source):
    source.hold, source.wanted = 4, BATCH  # the fourth sample of the first batch hangs
    found = []
    asking = threading.Thread(target=lambda: found.append(next(stream.batches(0, 12))))
    asking.start()
    assert source.all_read.wait(60), "the others of that batch are read while one hangs"
    source.released.set()
    asking.join(60)
    assert len(found[0]) == BATCH


def test_a_stream_that_is_ahead_is_read_by_one_thread(stream, source):
    seen = []
    for batch in stream.batches(0, 12):
        seen += batch.ids.tolist()
        time.sleep(0.2)  # a step of the training: what is read meanwhile is in time
    assert sorted(seen) == sorted(source.readers)
    late = sum(name.startswith("read") for name in source.readers.values())
    assert late <= 5 * BATCH, "only the first batches are late: those that are decoded ahead"
