"""A window cut out of a JPEG with restart markers has the picture's pixels, bit for bit, in both loaders.

A run may move between originals, shards and shards with restart markers; damage never shows as other pixels.
"""

import errno
import functools
import os
import shutil
import subprocess
from io import BytesIO

import numpy as np
import pytest
import runs
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import DataConfig, TrainConfig
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.jpeg import read_frame
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.shards.restart import TABLE, TableError, make_entry, plan_cut
from pipeline.dataset.shards.transcode import transcode
from pipeline.loader import build, source
from pipeline.loader.plan import Planned, make_train_plan
from pipeline.loader.source import Source
from pipeline.loader.stream import EncodedBatch, UndecodableSample
from pipeline.rank_info import RankInfo

pytestmark = pytest.mark.skipif(
    not (shutil.which("jpegtran") and shutil.which("cjpeg")), reason="jpegtran or cjpeg is not installed"
)
SAMPLINGS = {"4:4:4": "1x1", "4:2:2": "2x1", "4:2:0": "2x2", "4:4:0": "1x2", "4:1:1": "4x1", "gray": ""}
LOADERS = [
    "reference",
    pytest.param("dali", marks=pytest.mark.skipif(build.dali_problem() is not None, reason="no DALI")),
]


@functools.cache
def make_jpeg(width: int, height: int, sampling: str, interval: int, progressive: bool = False) -> bytes:
    """Noise over a gradient, so that every block and its neighbors differ; with restart markers."""
    rng = np.random.default_rng([width, height])
    pixels = np.linspace(0, 130, width)[None, :, None] + rng.integers(0, 120, (height, width, 3))
    ppm = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(ppm, "PPM")
    command = ["cjpeg", "-quality", "90", *(["-progressive"] if progressive else [])]
    command += ["-grayscale"] if sampling == "gray" else ["-sample", SAMPLINGS[sampling]]
    data = subprocess.run(command, input=ppm.getvalue(), capture_output=True, check=True).stdout
    made = transcode(data, interval)
    assert made is not None
    return made


@functools.cache
def whole_pixels(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def cut_out(data: bytes, window: tuple[int, int, int, int]) -> tuple[bytes, int, int]:
    """(JPEG, left, top) of the part that holds a window; the bytes that are not asked for are not looked at."""
    digest = xxhash.xxh3_64_intdigest(data)
    entry = make_entry(data, digest)
    assert entry is not None
    cut = plan_cut(entry, digest, window)
    if cut is None:
        return data, 0, 0
    made = bytes(cut.assemble(data[cut.start : cut.start + cut.size]))
    frame = read_frame(made)
    assert (frame.width, frame.height) == (cut.width, cut.height)
    return made, cut.left, cut.top


def assert_equal_window(data: bytes, window: tuple[int, int, int, int]) -> int:
    """The window's pixels in the part are the picture's. Returns the part's bytes."""
    made, left, top = cut_out(data, window)
    x, y, w, h = window
    with Image.open(BytesIO(made)) as image:
        found = np.asarray(image.convert("RGB"))[y - top : y - top + h, x - left : x - left + w]
    assert found.shape == (h, w, 3)
    np.testing.assert_array_equal(found, whole_pixels(data)[y : y + h, x : x + w])
    return len(made)


SIZES = [(1, 1), (3, 2), (8, 8), (17, 9), (33, 35), (35, 70), (64, 64), (131, 94), (250, 131), (499, 61), (5000, 33)]
SIZES += [(21, 4999)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", SIZES)
def test_windows_at_all_borders_and_of_one_pixel(size, sampling):
    width, height = size
    data = make_jpeg(width, height, sampling, 1 if width < 300 else 4)
    assert assert_equal_window(data, (0, 0, width, height)) == len(data)
    for x in {0, 1, 15, 16, 17, 31, 32, width // 2, width - 5, width - 4, width - 3, width - 2, width - 1}:
        for y in {0, 15, 16, 17, height // 2, height - 3, height - 2, height - 1}:
            if 0 <= x < width and 0 <= y < height:
                assert_equal_window(data, (x, y, 1, 1))
                assert_equal_window(data, (x, y, width - x, height - y))
                assert_equal_window(data, (0, 0, x + 1, y + 1))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_window_of_any_kind(data):
    width, height = data.draw(st.sampled_from([(37, 50), (95, 41), (160, 120), (333, 77)]))
    sampling, interval = data.draw(st.sampled_from(sorted(SAMPLINGS))), data.draw(st.sampled_from([1, 2, 4, 8, 999]))
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    w, h = data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y))
    assert_equal_window(make_jpeg(width, height, sampling, interval, data.draw(st.booleans())), (x, y, w, h))


def test_a_window_is_a_fraction_of_the_bytes():
    data = make_jpeg(499, 375, "4:2:0", 4)
    assert assert_equal_window(data, (250, 200, 100, 80)) < 0.2 * len(data)
    digest = xxhash.xxh3_64_intdigest(data)
    cut = plan_cut(make_entry(data, digest), digest, (250, 200, 100, 80))
    assert cut.size < 0.35 * len(data)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_decoders_see_the_same_in_the_part_as_in_the_whole(loader, sampling):
    side = 24
    rng = np.random.default_rng(0)
    data = make_jpeg(131, 94, sampling, 1)
    corners = [(0, 0), (131 - side, 94 - side), (0, 94 - side), (131 - side, 0)]
    corners += list(zip(rng.integers(0, 131 - side, 12).tolist(), rng.integers(0, 94 - side, 12).tolist(), strict=True))
    windows = np.array([(x, y, side, side) for x, y in corners], np.int32)
    pieces = [cut_out(data, tuple(window)) for window in windows.tolist()]
    count = len(corners)
    rois = np.tile(np.array([0, 0, side, side], float), (count, 1))
    planned = Planned(np.arange(count), np.zeros(count, int), windows, rois, np.zeros(count, bool), side)
    encoded = [np.frombuffer(piece, np.uint8) for piece, _, _ in pieces]
    origins = np.array([piece[1:] for piece in pieces], np.int32)
    decoder = build.make_decoder(loader, count, 1, torch.device("cpu"), 1)
    (images,) = decoder.decode([EncodedBatch(0, planned, encoded, origins)])
    decoder.close()
    for image, (x, y) in zip(images.numpy(), corners, strict=True):
        np.testing.assert_array_equal(image, whole_pixels(data)[y : y + side, x : x + side])


def test_changed_bytes_and_entries_that_do_not_fit_are_refused():
    data, other = make_jpeg(250, 131, "4:2:0", 4), make_jpeg(251, 131, "4:2:0", 4)
    digest = xxhash.xxh3_64_intdigest(data)
    entry, window = make_entry(data, digest), (100, 50, 60, 30)
    cut = plan_cut(entry, digest, window)
    read = bytearray(data[cut.start : cut.start + cut.size])
    for at in (0, len(read) // 2, len(read) - 1):
        spoiled = read.copy()
        spoiled[at] ^= 1
        with pytest.raises(TableError, match="changed"):
            cut.assemble(bytes(spoiled))
    with pytest.raises(TableError, match="bytes of"):
        cut.assemble(bytes(read[:-1]))
    for wrong in (entry[:5], entry[:-1], b"", bytes([*entry[:30], entry[30] ^ 1, *entry[31:]])):
        with pytest.raises(TableError):
            plan_cut(wrong, digest, window)
    with pytest.raises(TableError, match="does not fit"):
        plan_cut(make_entry(other, xxhash.xxh3_64_intdigest(other)), digest, window)


@pytest.fixture(scope="module")
def roots(synthetic_root, tmp_path_factory):
    """The same pictures as a tree, as shards, and as shards with restart markers."""
    build_index(synthetic_root)
    folder = tmp_path_factory.mktemp("roots")
    pack_tree(synthetic_root, folder / "shards", Options())
    pack_tree(synthetic_root, folder / "restart", Options(restart=1))
    return {"tree": synthetic_root, "shards": folder / "shards", "restart": folder / "restart"}


def open_streams(root, loader):
    index = open_index(root / "index")
    config = DataConfig(loader=loader, image_size=48, val_size=48, val_resize=56).resolve()
    plan = make_train_plan(index, config, TrainConfig(global_batch_size=12, seed=3))
    return (
        build.make_train_stream(index, plan, config, RankInfo()),
        build.make_eval_stream(index, config, 5, RankInfo()),
    )


def batches_of(root, loader):
    found = []
    for stream, steps in zip(open_streams(root, loader), (10, 5), strict=True):
        found += list(stream.batches(0, steps))
        assert not stream.unreadable
        stream.close()
    return found


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_the_same_wherever_the_bytes_lie(roots, loader, monkeypatch):
    fingerprints = {open_index(root / "index").fingerprint for root in roots.values()}
    assert len(fingerprints) == 1
    tree, shards = batches_of(roots["tree"], loader), batches_of(roots["shards"], loader)
    cut, real = [], Source._cut

    def spy(self, row, window):
        made = real(self, row, window)
        cut.append(made is not None)
        return made

    monkeypatch.setattr(Source, "_cut", spy)
    restart = batches_of(roots["restart"], loader)
    assert sum(cut) > 60, "windows are cut, not read as a whole"
    for one, other, third in zip(tree, shards, restart, strict=True):
        assert torch.equal(one.ids, third.ids) and torch.equal(one.targets, third.targets)
        assert torch.equal(one.images, other.images) and torch.equal(one.images, third.images)


@pytest.mark.parametrize("loader", LOADERS)
def test_samples_that_are_left_out_move_no_window_of_the_others(roots, loader):
    batches = []
    for kind in ("tree", "restart"):
        stream, other = open_streams(roots[kind], loader)
        skip = frozenset(stream.plan.local(1).ids[[0, 4]].tolist())
        batches.append(list(stream.batches(0, 4, skip)))
        stream.close()
        other.close()
    for one, other in zip(*batches, strict=True):
        assert skip.isdisjoint(one.ids.tolist())
        assert torch.equal(one.ids, other.ids) and torch.equal(one.images, other.images)


@pytest.mark.long
def test_a_run_killed_on_one_resumes_on_the_others_bit_for_bit(roots, tmp_path):
    steps = 19  # of tests/tiny.yaml
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    runs.train(roots["tree"], whole)
    runs.kill_once_saved(3, roots["restart"], moved, "--checkpoint.every_steps", "3")
    runs.kill_once_saved(10, roots["tree"], moved, "--checkpoint.every_steps", "3")
    runs.kill_once_saved(15, roots["shards"], moved, "--checkpoint.every_steps", "3")
    runs.train(roots["restart"], moved)
    assert [row["step"] for row in runs.rows(moved, "train")] == list(range(1, steps + 1))
    assert len([row for row in runs.rows(moved, "event") if row["event"] == "resumed"]) == 3
    assert runs.repeatable(moved) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(moved, steps), runs.checkpoint_at(whole, steps))


@pytest.fixture
def own(roots, tmp_path):
    return shutil.copytree(roots["restart"], tmp_path / "own")


def find_cut(stream):
    """(step, position, sample, cut) of a sample of the first steps that is read in part."""
    split = stream.source.split
    for step in range(10):
        planned = stream.plan.local(step)
        for position, row in enumerate(stream.source._rows(planned.ids)):
            cut = stream.source._cut(row, tuple(planned.windows[position].tolist()))
            if cut is not None and np.count_nonzero(planned.ids == row.sample_id) == 1:
                return step, position, row.sample_id, cut
    raise AssertionError(split)


@pytest.mark.parametrize("how", ["flipped bit", "cut shard"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_damaged_sample_is_substituted_and_no_other_pixel_changes(own, loader, how):
    stream, _ = open_streams(own, loader)
    healthy = list(stream.batches(0, 10))
    step, position, sample, cut = find_cut(stream)
    record = stream.source.split.records[sample]
    path, at = stream.source.split.path(sample), int(record["offset"]) + cut.start + cut.size // 2
    stream.close()
    with path.open("r+b") as file:
        if how == "flipped bit":
            file.seek(at)
            value = file.read(1)[0]
            file.seek(at)
            file.write(bytes([value ^ 4]))
        else:
            file.truncate(at)
    stream, _ = open_streams(own, loader)
    mended = list(stream.batches(0, 10))
    assert sample in stream.unreadable
    assert int(mended[step].ids[position]) != sample
    if how == "flipped bit":
        assert list(stream.unreadable) == [sample]
        assert int(mended[step].ids[position]) == stream.plan.substitute(sample, 0)
    for before, after in zip(healthy, mended, strict=True):
        same = before.ids == after.ids
        assert torch.equal(before.images[same], after.images[same])
    stream.close()


@pytest.mark.parametrize("how", ["missing", "damaged", "cut off", "of another shard"])
def test_a_table_that_does_not_fit_costs_time_and_no_pixel(own, how, caplog):
    stream, _ = open_streams(own, "reference")
    healthy = list(stream.batches(0, 10))
    table = stream.source.split.path(0).with_suffix(TABLE)
    stream.close()
    if how == "missing":
        table.unlink()
    elif how == "damaged":
        table.write_bytes(bytes(value ^ 1 for value in table.read_bytes()))
    elif how == "cut off":
        table.write_bytes(table.read_bytes()[:100])
    else:
        shutil.copy(own / "val-000000.restart", table)
    stream, _ = open_streams(own, "reference")
    for before, after in zip(healthy, stream.batches(0, 10), strict=True):
        assert torch.equal(before.ids, after.ids) and torch.equal(before.images, after.images)
    assert not stream.unreadable
    stream.close()
    warnings = caplog.messages
    assert len(warnings) == 1 and "restart table damaged or missing" in warnings[0]
    assert "pipeline verify" in warnings[0]


def test_a_table_on_a_failing_disk_is_tried_once(own, monkeypatch):
    """Each try waits for a network file system; an image of a batch each would stop the run."""
    waits = []
    monkeypatch.setattr(source.time, "sleep", waits.append)
    real = Source._read_at

    def fail(self, row, start, size, suffix=""):
        if suffix == TABLE:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, row, start, size, suffix)

    monkeypatch.setattr(Source, "_read_at", fail)
    opened = Source(open_index(own / "index").splits["train"], threads=1)
    ids = np.flatnonzero(opened.split.restart["table_size"])[:5]
    pieces = opened.read_windows(ids, np.tile(np.array([0, 0, 9, 9], np.int32), (5, 1)))
    opened.close()
    assert [bytes(piece.data) for piece in pieces] == [opened.split.read(i) for i in ids]
    assert sum(waits) < 10


def test_what_no_decoder_takes_is_named_by_its_step_and_position():
    whole = np.frombuffer(make_jpeg(37, 50, "4:2:0", 1), np.uint8)
    windows = np.tile(np.array([0, 0, 20, 20], np.int32), (2, 1))
    planned = Planned(np.arange(2), np.zeros(2, int), windows, windows.astype(float), np.zeros(2, bool), 20)
    decoder = build.make_decoder("dali", 2, 1, torch.device("cpu"), 1)
    with pytest.raises(UndecodableSample) as raised:
        list(decoder.decode([EncodedBatch(7, planned, [whole, whole[:30]])]))
    assert (raised.value.step, raised.value.position) == (7, 1)
    assert len(list(decoder.decode([EncodedBatch(7, planned, [whole, whole])]))) == 1, "it goes on"
    decoder.close()
