"""Who reads a batch: one thread while batches are in time, all threads once somebody waits."""

import threading
import time

import numpy as np
import pytest

from pipeline.config import DataConfig, TrainConfig
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings, generate_tree
from pipeline.errors import TransientError
from pipeline.loader.build import make_train_plan, make_train_stream
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
    """Notes which thread reads which sample. `hold`: samples whose read waits for `released`."""

    def __init__(self, split, threads=4):
        super().__init__(split, threads)
        self.readers: dict[int, str] = {}
        self.hold: set[int] = set()
        self.held, self.released = threading.Event(), threading.Event()
        self.pause_s = 0.0

    def _read(self, row):
        self.readers[row.sample_id] = threading.current_thread().name
        if row.sample_id in self.hold:
            self.held.set()
            assert self.released.wait(60)
        time.sleep(self.pause_s)
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
    source.hold = {3}
    found = []
    reading = threading.Thread(target=lambda: found.append(source.read_batch(np.arange(BATCH))))
    reading.start()
    assert source.held.wait(60)
    assert set(source.readers) == {0, 1, 2, 3}, "alone, in order"
    source.hurry(more=False)
    deadline = time.monotonic() + 60
    while len(source.readers) < BATCH and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(source.readers) == set(range(BATCH)), "the others were read while one hangs"
    source.released.set()
    reading.join(60)
    (read,) = found
    digests = source.split.records["digest"][:BATCH]
    again = [source.read(i) for i in range(BATCH)]
    assert len(digests) == len(read) and all(map(np.array_equal, read, again)), "in the order asked for"
    source.readers.clear()
    source.read_batch(np.arange(BATCH, 2 * BATCH))
    assert set(source.readers.values()) == {threading.current_thread().name}, "the next is in time again"


def test_after_a_late_batch_some_are_read_by_all(source):
    source.hurry(more=True)
    source.pause_s = 0.02
    source.read_batch(np.arange(BATCH))
    assert len(set(source.readers.values())) > 1


def test_an_error_of_a_helper_ends_the_batch(source, monkeypatch):
    def gone(row):
        if threading.current_thread().name.startswith("read"):
            raise TransientError("data root is gone")
        time.sleep(0.05)
        return Source._read(source, row)

    monkeypatch.setattr(source, "_read", gone)
    source.hurry(more=True)
    with pytest.raises(TransientError, match="gone"):
        source.read_batch(np.arange(BATCH))


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_a_stream_that_waits_for_slow_files_is_helped(index, pause_s):
    data = DATA.resolve()
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=BATCH))
    stream = make_train_stream(index, plan, data, RankInfo())
    watched = Watched(index.splits["train"])
    watched.pause_s = pause_s
    stream.source.close()
    stream.source = watched
    seen = []
    for batch in stream.batches(0, 12):
        seen += batch.ids.tolist()
        time.sleep(0 if pause_s else 0.2)  # a step of the training
    stream.close()
    assert sorted(seen) == sorted(watched.readers)
    by_others = sum(name.startswith("read") for name in watched.readers.values())
    if pause_s:
        assert by_others > 3 * BATCH, "slow files are read by several threads"
    else:
        assert by_others <= 5 * BATCH, "only the first batches are late: those that are decoded ahead"
