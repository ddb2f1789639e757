"""The two decoders give the same batches, pixels as torchvision's, and bear unreadable samples."""

import errno
import gc
import os
import shutil
import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import hflip, resized_crop

from pipeline.config import DataConfig, TrainConfig
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.errors import TransientError
from pipeline.loader import build
from pipeline.loader.decode.dali import DaliDecoder
from pipeline.loader.decode.resize import Resizer
from pipeline.loader.eval_plan import EvalPlan
from pipeline.loader.plan import Planned, make_train_plan
from pipeline.loader.source import UnreadableSample
from pipeline.loader.stream import EncodedBatch, UndecodableSample
from pipeline.rank_info import RankInfo

CPU = torch.device("cpu")
ALONE = RankInfo()
LOADERS = [
    "reference",
    pytest.param("dali", marks=pytest.mark.skipif(build.dali_problem() is not None, reason="no DALI")),
]


@pytest.fixture
def own_root(synthetic_root, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(synthetic_root, tmp_path / "data")


@pytest.fixture(scope="module")
def index(synthetic_root):
    return build_index(synthetic_root)


def streams(index, loader, batch=12, place=ALONE, **data):
    config = DataConfig(loader=loader, image_size=64, val_size=64, val_resize=72, **data).resolve()
    plan = make_train_plan(index, config, TrainConfig(global_batch_size=batch, seed=3))
    return (
        build.make_train_stream(index, plan, config, place),
        build.make_eval_stream(index, config, 5, place),
    )


def pixels(index, split, sample):
    return Image.open(index.splits[split].path(sample)).convert("RGB")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("loader", LOADERS)
def test_training_pixels_are_torchvisions(index, loader, interpolation):
    stream, _ = streams(index, loader, interpolation=interpolation)
    differences = []
    for step, batch in enumerate(stream.batches(0, 8)):
        planned = stream.plan.local(step)
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (12, 64, 64, 3)
        np.testing.assert_array_equal(batch.ids, planned.ids)
        np.testing.assert_array_equal(batch.targets, index.splits["train"].records["label"][planned.ids])
        for i, (left, top, width, height) in enumerate(planned.windows.tolist()):
            whole, box = pixels(index, "train", planned.ids[i]), (top, left, height, width)
            image = resized_crop(whole, *box, [64, 64], InterpolationMode(interpolation))
            image = hflip(image) if planned.flips[i] else image
            differences.append(np.abs(np.asarray(image, int) - batch.images[i].numpy()))
    assert np.mean(differences) <= (0.03 if loader == "dali" else 0.0)
    assert np.max(differences) <= (2 if interpolation == "bilinear" else 6)
    stream.close()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("loader", LOADERS)
def test_validation_pixels_are_torchvisions(index, loader, interpolation):
    _, stream = streams(index, loader, interpolation=interpolation)
    transform = Compose([Resize(72, InterpolationMode(interpolation)), CenterCrop(64)])
    differences, ids = [], []
    with torch.inference_mode():  # as evaluation reads them
        batches = list(stream.batches(0, stream.plan.steps(1)))
    for batch in batches:
        ids += batch.ids.tolist()
        for i, sample in enumerate(batch.ids.tolist()):
            expected = np.asarray(transform(pixels(index, "val", sample)), int)
            differences.append(np.abs(expected - batch.images[i].numpy()))
    assert ids == list(range(len(index.splits["val"])))
    if loader == "reference":
        assert np.max(differences) == 0
    mean, most = (0.2, 1) if interpolation == "bilinear" else (0.03, 2)
    assert np.mean(differences) <= mean and np.max(differences) <= most
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_decoding_a_window_is_exact(index, loader):
    """A window that needs no resizing comes out as PIL's crop, bit for bit."""
    size = 32
    decoder = build.make_decoder(loader, 4, 1, CPU, 2)
    ids = np.arange(4)
    windows = np.array([[3, 5, size, size]] * 4, np.int32)
    rois = np.array([[0, 0, size, size]] * 4, float)
    planned = Planned(ids, np.zeros(4, int), windows, rois, np.zeros(4, bool), size)
    data = [np.fromfile(index.splits["train"].path(i), np.uint8) for i in ids]
    (images,) = decoder.decode([EncodedBatch(0, planned, data)])
    for i in ids:
        expected = pixels(index, "train", i).crop((3, 5, 3 + size, 5 + size))
        np.testing.assert_array_equal(images[i].numpy(), np.asarray(expected))


@pytest.mark.parametrize("loader", LOADERS)
def test_any_step_can_be_first(index, loader):
    stream, _ = streams(index, loader)
    whole = list(stream.batches(0, 12))
    part = list(stream.batches(5, 9))  # the same stream again, begun in the middle
    for a, b in zip(whole[5:9], part, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids)
    unfinished = stream.batches(0, 12)
    next(unfinished)
    unfinished.close()
    assert torch.equal(next(stream.batches(7, 8)).images, whole[7].images)
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_images_grow_without_a_new_pipeline(index, loader):
    """Progressive resizing: 32, 64 and 96 px in one stream, whose decoder is built once."""
    growing = DataConfig(loader=loader, image_size=96, start_size=32, ramp_epochs=(0, 2)).resolve()
    plan = make_train_plan(index, growing, TrainConfig(global_batch_size=24, seed=3))
    stream = build.make_train_stream(index, plan, growing, RankInfo())
    sizes, pipelines = [], set()
    for first in (0, 4, 8):  # the loop begins a stream again at each epoch
        for batch in stream.batches(first, first + 4):
            sizes.append(batch.images.shape[1])
            (left, top, width, height), planned = plan.local(len(sizes) - 1).windows[0].tolist(), batch
        pipelines.add(id(getattr(stream.decoder, "pipeline", None)))
    assert sizes == [32] * 4 + [64] * 4 + [96] * 4 and len(pipelines) == 1
    assert list(stream.batches(3, 5))[1].images.shape == (24, 64, 64, 3)  # and within a stream
    image = resized_crop(pixels(index, "train", int(planned.ids[0])), top, left, height, width, [96, 96])
    image = hflip(image) if plan.local(11).flips[0] else image
    assert np.abs(np.asarray(image, int) - planned.images[0].numpy()).max() <= 2
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_share_the_global_batch(index, loader):
    whole, whole_eval = streams(index, loader)
    parts = [streams(index, loader, place=RankInfo(rank, 3)) for rank in range(3)]
    for step in (0, 7):
        joined = torch.cat([next(train.batches(step, step + 1)).images for train, _ in parts])
        assert torch.equal(joined, next(whole.batches(step, step + 1)).images)
    scored = [batch.ids for _, part in parts for batch in part.batches(0, part.plan.steps(3))]
    assert torch.cat(scored).tolist() == list(range(whole_eval.plan.samples))


def damage(index, split, sample, how):
    path = index.splits[split].path(sample)
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "vanished":
        path.unlink()
    else:  # one byte
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    return sample


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("how", ["truncated", "vanished", "changed"])
def test_unreadable_training_samples_are_substituted(own_root, loader, how):
    index = build_index(own_root)
    stream, _ = streams(index, loader)
    healthy = list(stream.batches(0, 8))
    bad = damage(index, "train", int(healthy[3].ids[4]), how)
    stream.close()
    stream, _ = streams(index, loader)
    mended = list(stream.batches(0, 8))
    replaced = int(mended[3].ids[4])
    assert replaced == stream.plan.substitute(bad, 0)
    assert list(stream.unreadable) == [bad]
    for a, b in zip(healthy, mended, strict=True):
        same = a.ids == b.ids
        assert torch.equal(a.images[same], b.images[same])
    assert sum((a.ids != b.ids).sum().item() for a, b in zip(healthy, mended, strict=True)) == 1
    assert mended[3].targets[4] == index.splits["train"].records["label"][replaced]
    avoided = list(stream.batches(0, 8, skip=frozenset([bad])))  # known before: the same substitute
    assert all(torch.equal(a.images, b.images) for a, b in zip(mended, avoided, strict=True))
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_unreadable_validation_samples_are_left_out(own_root, loader):
    index = build_index(own_root)
    for sample in (0, 1, 2, 3, 4, 11):  # the whole first batch of 5, and one more
        damage(index, "val", sample, "truncated")
    _, stream = streams(index, loader)
    ids = torch.cat([batch.ids for batch in stream.batches(0, stream.plan.steps(1))]).tolist()
    assert ids == [i for i in range(len(index.splits["val"])) if i not in (0, 1, 2, 3, 4, 11)]
    assert sorted(stream.unreadable) == [0, 1, 2, 3, 4, 11]
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_sample_that_only_the_decoder_refuses_is_substituted(own_root, loader, monkeypatch):
    """The digest agrees, but the decoder fails, in mid-stream."""
    index = build_index(own_root)
    stream, _ = streams(index, loader)
    healthy = list(stream.batches(0, 8))
    bad = int(healthy[4].ids[2])
    read_batch, whole = stream.source.read_batch, stream.source.read(bad)
    half = whole[: len(whole) // 3]

    def read_half(ids, prepare):
        return [half if i == bad else data for i, data in zip(ids.tolist(), read_batch(ids, prepare), strict=True)]

    monkeypatch.setattr(stream.source, "read_batch", read_half)
    mended = list(stream.batches(0, 8))
    assert len(mended) == 8 and list(stream.unreadable) == [bad]
    assert int(mended[4].ids[2]) == stream.plan.substitute(bad, 0)
    for step in (0, 1, 2, 3, 5, 6, 7):
        assert torch.equal(mended[step].images, healthy[step].images)
    stream.close()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("loader", LOADERS)
def test_decoders_find_the_sample_they_refuse(loader, named, monkeypatch):
    """DALI's message names the sample, except where it does not: then another decoder looks for it."""
    made, make = [], DaliDecoder._build
    monkeypatch.setattr(DaliDecoder, "_build", lambda self: made.append(self) or make(self))
    if not named:
        monkeypatch.setattr("pipeline.loader.decode.dali._sample_number", lambda message: None)
    decoder = build.make_decoder(loader, 3, 1, CPU, 1)
    noise = BytesIO()
    Image.effect_noise((64, 64), 90).save(noise, "JPEG")
    good = np.frombuffer(noise.getvalue(), np.uint8)
    windows = np.array([[0, 0, 64, 64]] * 3, np.int32)
    planned = Planned(np.arange(3), np.zeros(3, int), windows, windows.astype(float), np.zeros(3, bool), 8)
    with pytest.raises(UndecodableSample) as caught:
        list(decoder.decode([EncodedBatch(6, planned, [good, good, good[: len(good) // 3]])]))
    assert (caught.value.step, caught.value.position) == (6, 2)
    assert len({id(one) for one in made}) == (loader == "dali") * (1 if named else 2)


@pytest.mark.parametrize("loader", LOADERS)
def test_too_many_unreadable_samples_stop_the_run(own_root, loader):
    index = build_index(own_root)
    for sample in range(5):
        damage(index, "train", sample, "truncated")
    stream, _ = streams(index, loader, max_unreadable=3)
    with pytest.raises(TransientError, match="more than 3 unreadable samples"):
        list(stream.batches(0, 8))
    stream.close()


def test_a_data_root_that_is_gone_is_no_bad_sample(own_root):
    index = build_index(own_root)
    stream, _ = streams(index, "reference")
    own_root.rename(own_root.with_name("elsewhere"))
    with pytest.raises(TransientError, match="is gone"):
        list(stream.batches(0, 1))
    stream.close()


def test_a_folder_that_a_network_file_system_shows_late_is_waited_for(own_root, monkeypatch):
    """Its files are no unreadable samples: the folder is there at the second look."""
    index = build_index(own_root)
    stream, _ = streams(index, "reference")
    folder = stream.source.split.path(0).parent
    hidden = folder.with_name("not-yet")
    folder.rename(hidden)
    waits = []

    def show(seconds):
        waits.append(seconds)
        if hidden.exists():
            hidden.rename(folder)

    monkeypatch.setattr("pipeline.loader.source.time.sleep", show)
    assert len(stream.source.read(0)) and waits
    folder.joinpath(stream.source.split.path(1).name).unlink()
    waits.clear()
    with pytest.raises(UnreadableSample):  # the folder is there, the file is not: at once
        stream.source.read(1)
    assert not waits
    stream.close()


def test_a_folder_that_was_removed_is_waited_for_once(own_root, monkeypatch):
    """Not by each of its files: seconds each, for all images of a class."""
    index = build_index(own_root)
    stream, _ = streams(index, "reference")
    shutil.rmtree(stream.source.split.path(0).parent)
    waits = []
    monkeypatch.setattr("pipeline.loader.source.time.sleep", waits.append)
    for sample in (0, 1, 2):
        with pytest.raises(UnreadableSample, match="No such file"):
            stream.source.read(sample)
    assert waits == [0.1, 1.0, 5.0]
    stream.close()


def test_a_shard_replaced_by_another_stops_the_run(synthetic_root, tmp_path):
    """One with images of the same kind, sound in itself."""
    pack_tree(synthetic_root, tmp_path / "shards", Options())
    train, val = (next((tmp_path / "shards").glob(f"{split}-*.tar")) for split in ("train", "val"))
    shutil.copy(val, train)
    stream, _ = streams(open_index(tmp_path / "shards/index"), "reference", max_unreadable=3)
    with pytest.raises(TransientError, match=r"more than 3 unreadable samples, the last one train-.*pipeline verify"):
        next(stream.batches(0, 8))
    stream.close()


@pytest.mark.parametrize(
    ("width", "height"),
    [(500, 320), (320, 500), (640, 480), (480, 640), (1600, 1200), (200, 160), (256, 160), (500, 375)],
)
def test_no_validation_pixel_is_off_by_two_where_sums_lie_halfway(width, height):
    """As where 320 rows become 256, a factor of 5 / 4: of both axes, of one, enlarged, and of none."""
    bands = [Image.effect_noise((width, height), 60 + 30 * i) for i in range(3)]
    image = Image.merge("RGB", bands)
    plan = EvalPlan(np.array([width]), np.array([height]), 1, 256, 224)
    planned = plan.cut(np.array([0]), np.array([0]))
    left, top, w, h = planned.windows[0].tolist()
    window = np.array(image)[top : top + h, left : left + w]
    resizer = Resizer(1)
    (found,) = resizer.start([window], planned).result()
    resizer.close()
    size = 256 * width // min(width, height), 256 * height // min(width, height)
    wide = image.resize((size[0], height), Image.Resampling.BILINEAR)  # Pillow 13 does some shapes vertically first
    expected = np.asarray(CenterCrop(224)(wide.resize(size, Image.Resampling.BILINEAR)), int)
    assert np.abs(expected - found.numpy()).max() == 1


@pytest.mark.parametrize("problem", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_a_resizer_whose_threads_can_not_start_leaves_none_behind(monkeypatch, problem):
    start = threading.Thread.start

    def start_two(thread):
        if thread.name == "resize_2":
            raise problem
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    before = torch.get_num_threads()
    with pytest.raises(type(problem)):
        Resizer(4)
    assert torch.get_num_threads() == before
    gc.collect()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("resize_")]:
        thread.join(20)
        assert not thread.is_alive()


def test_each_image_is_resized_by_one_thread():
    """Torch would divide it among the cores, and the parts would wait for each other."""
    resizer = Resizer(2)
    numbers = {resizer.pool.submit(torch.get_num_threads).result() for _ in range(8)}
    resizer.close()
    assert numbers == {1}


@pytest.mark.parametrize("shape", [(301, 421), (411, 307), (257, 263), (641, 479), (91, 133)])
def test_bicubic_validation_is_within_a_level_of_pils_two_passes(shape):
    """Noise with full contrast overshoots at each edge. Pillow 13 makes the vertical pass first for some shapes: here
    the passes are called one by one, horizontal first, as earlier versions do."""
    height, width = shape
    pixels = np.random.default_rng(7).choice(np.array([0, 255], np.uint8), (height, width, 3))
    image = Image.fromarray(pixels)
    plan = EvalPlan(np.array([width]), np.array([height]), 1, 144, 128, support=2)
    planned = plan.cut(np.array([0]), np.array([0]))
    left, top, w, h = planned.windows[0].tolist()
    resizer = Resizer(1, "bicubic")
    (found,) = resizer.start([pixels[top : top + h, left : left + w]], planned).result()
    resizer.close()
    short = min(width, height)
    size = 144 * width // short, 144 * height // short
    wide = image.resize((size[0], height), Image.Resampling.BICUBIC)
    expected = CenterCrop(128)(wide.resize(size, Image.Resampling.BICUBIC))
    assert np.abs(np.asarray(expected, int) - found.numpy()).max() <= 1


def test_a_shard_whose_handle_is_stale_is_opened_again(own_root, tmp_path, monkeypatch):
    """Its server was away for a moment: the old handle never gets well, and every sample in the shard was lost."""
    stream, _ = streams(pack_tree(own_root, tmp_path / "shards", Options(), processes=1), "reference")
    source, pread = stream.source, os.pread
    wanted = source.read(0)
    (opened,) = source._shards.values()

    def read(descriptor, size, start):
        if descriptor == opened.descriptor:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, size, start)

    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr("pipeline.loader.source.time.sleep", lambda seconds: None)
    np.testing.assert_array_equal(source.read(0), wanted)
    stream.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_sample_that_is_known_to_be_unreadable_is_not_tried_again(own_root, loader, monkeypatch):
    """On a failing disk each try takes seconds, and there were some in every epoch."""
    index = build_index(own_root)
    stream, _ = streams(index, loader)
    bad = frozenset(stream.plan.local(2).ids[[0, 5]].tolist())
    for sample in bad:
        damage(index, "train", sample, "truncated")
    expected, tried = [batch.ids.tolist() for batch in stream.batches(0, 8)], []
    assert stream.unreadable.keys() == bad
    rows = stream.source._rows
    monkeypatch.setattr(stream.source, "_rows", lambda ids: tried.extend(ids.tolist()) or rows(ids))
    assert [batch.ids.tolist() for batch in stream.batches(0, 8, bad)] == expected
    assert tried and bad.isdisjoint(tried)
    stream.close()


def test_a_server_that_is_away_for_a_moment_is_waited_for(own_root, monkeypatch):
    """Also where the data root itself does not answer meanwhile: that ended the run."""
    stream, _ = streams(build_index(own_root), "reference")
    source, waits = stream.source, []
    wanted, read, is_dir = source.read(0), source._read, Path.is_dir

    def answers(call, *arguments):
        if len(waits) < 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call(*arguments)

    monkeypatch.setattr(source, "_read", lambda row: answers(read, row))
    monkeypatch.setattr(Path, "is_dir", lambda path: answers(is_dir, path))
    monkeypatch.setattr("pipeline.loader.source.time.sleep", waits.append)
    np.testing.assert_array_equal(source.read(0), wanted)
    assert waits == [0.1, 1.0]
    stream.close()
