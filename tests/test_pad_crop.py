"""Padding and a random crop, alternating flips, and the mean of the last epochs' weights: what short recipes use."""

import numpy as np
import pytest
import runs
import scipy.stats
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import crop, hflip, pad, resize

from pipeline import TrainLoader
from pipeline.augment.ops import apply_ops
from pipeline.config import AugmentConfig, DataConfig, TrainConfig, parse_config
from pipeline.dataset.index.scan import build_index
from pipeline.errors import UserError
from pipeline.loader import build
from pipeline.loader.plan import TrainPlan, batch_digest, make_train_plan
from pipeline.loader.windows import padded_windows
from pipeline.rank_info import RankInfo
from pipeline.rng import hash_counter
from pipeline.training.optim.ema import WeightAverage

SIZE, PAD = 64, 8
LOADERS = [
    "reference",
    pytest.param("dali", marks=pytest.mark.skipif(build.dali_problem() is not None, reason="no DALI")),
]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """24 images of 32 x 32 pixels, as CIFAR-10's."""
    root = tmp_path_factory.mktemp("squares")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        for split in ("train", "val"):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((32, 32)).save(folder / f"{number:02}.png")
    return build_index(root)


def test_a_stream_refuses_a_reader_that_does_not_move_the_images(squares):
    config = DataConfig(image_size=SIZE, pad_crop=PAD).resolve()
    plan = make_train_plan(squares, config, TrainConfig(global_batch_size=24))
    with pytest.raises(UserError, match=r"the plan augments \(pad_crop 8\)"):
        build.make_train_stream(squares, plan, config, RankInfo())


def places(windows, shifts, length, resized):
    """Where the crops begin in the resized, padded images of this length."""
    return np.rint(windows * resized / length).astype(int) - shifts + PAD


@pytest.mark.parametrize("fill", [None, (9, 80, 200)])
@pytest.mark.parametrize("loader", LOADERS)
def test_pixels_are_torchvisions_padding_and_crop(squares, loader, fill):
    config = DataConfig(loader=loader, image_size=SIZE, pad_crop=PAD).resolve()
    plan = make_train_plan(squares, config, TrainConfig(global_batch_size=24, seed=3))
    stream = build.make_train_stream(squares, plan, config, RankInfo(), applies=plan.augment)
    (batch,) = stream.batches(0, 1)
    stream.close()
    images = apply_ops(batch.images, batch.pixel_ops, "nearest", fill).numpy().astype(int)
    planned = plan.local(0)
    starts = places(planned.windows[:, :2], planned.augment_params.shifts, 32, SIZE)
    assert len(np.unique(starts)) > 8 and (planned.windows == (0, 0, 32, 32)).all()
    for i, (left, top) in enumerate(starts.tolist()):
        whole = resize(Image.open(squares.splits["train"].path(int(planned.ids[i]))), [SIZE, SIZE])
        if planned.flips[i]:  # the image is flipped first, then moved
            whole = hflip(whole)
        expected = crop(pad(whole, PAD, fill or 0), top, left, SIZE, SIZE)
        assert np.abs(np.asarray(expected, int) - images[i]).max() <= 1, i


@pytest.mark.parametrize(("width", "height"), [(32, 32), (500, 375), (90, 200)])
def test_every_place_is_as_likely(width, height):
    keys = hash_counter(0, np.arange(40_000))
    sizes = (np.full(len(keys), length) for length in (width, height))
    windows, shifts = padded_windows(keys, *sizes, PAD, SIZE)
    for axis, length in enumerate((width, height)):
        resized = SIZE * length // min(width, height)
        found = places(windows[:, axis], shifts[:, axis], length, resized)
        counts = np.bincount(found, minlength=resized - SIZE + 2 * PAD + 1)
        assert len(counts) == resized - SIZE + 2 * PAD + 1
        assert scipy.stats.chisquare(counts).pvalue > 1e-3
        begins, ends = windows[:, axis], windows[:, axis] + windows[:, 2 + axis]
        assert begins.min() == 0 and ends.max() == length
        assert np.abs(windows[:, 2 + axis] - SIZE * length / resized).max() <= 1
        assert abs(shifts[:, axis]).max() == PAD
        assert (begins[shifts[:, axis] > 0] == 0).all()  # padding comes into view at its own side alone
        assert (ends[shifts[:, axis] < 0] == length).all()


def make_plan(samples=100, batch=20, **settings) -> TrainPlan:
    return TrainPlan(np.full(samples, 40), np.full(samples, 32), batch, 5, **settings)


def test_any_rank_sees_the_same_and_the_digest_covers_it():
    plan = make_plan(pad_crop=4)
    whole = plan.local(3)
    halves = [plan.local(3, rank, 2).augment_params.shifts for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), whole.augment_params.shifts)
    without = batch_digest(whole.ids, whole.windows, whole.flips)
    assert len({plan.digest(3, whole.ids), make_plan(pad_crop=5).digest(3, whole.ids), without}) == 3


@pytest.mark.parametrize("repeats", [1, 2])
def test_alternating_flips(repeats):
    """Between two times that it is seen an image is always flipped; a half of all images at any time."""
    plan = make_plan(samples=1000, batch=100, alternate_flips=True, augment=AugmentConfig(repeats=repeats))
    seen: dict[int, list[bool]] = {}
    for step in range(40):  # four epochs
        batch = plan.local(step)
        order = np.argsort(batch.copies, kind="stable")
        for sample, flip in zip(batch.ids[order].tolist(), batch.flips[order].tolist(), strict=True):
            seen.setdefault(sample, []).append(flip)
    assert all(flips in ([True, False] * 2, [False, True] * 2) for flips in seen.values()) and len(seen) == 1000
    assert 420 < sum(flips[0] for flips in seen.values()) < 580  # 5 standard deviations
    assert (make_plan(alternate_flips=True).local(0).flips != make_plan(alternate_flips=True).local(5).flips).any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--data.pad_crop 32", "--data.pad_crop is 32: give 1 to below data.image_size 32"),
        ("--data.pad_crop 0", "--data.pad_crop is 0: give 1"),
        ("--data.pad_crop 4 --data.shorter_side [32,48]", "no data.shorter_side"),
        ("--data.alternate_flips true --data.flip 0.3", "data.flip is 0.3; leave that out"),
        ("--ema.last_epochs 0", "--ema.last_epochs is 0.0: give epochs"),
        ("--ema.last_epochs 1 --ema.decay 0.9", "ema.decay is 0.9; give one of them"),
    ],
)
def test_what_is_impossible_is_one_line(root, tmp_path, options, said):
    printed = runs.call(root, tmp_path / "run", *options.split(), expect=2)
    assert said in printed and len(printed.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_mean_of_the_last_epochs_by_hand():
    network = nn.Linear(2, 1, bias=False)
    config = parse_config(["--config", str(runs.TINY), "--ema.last_epochs", "1", "--ema.every_steps", "2"])
    average = WeightAverage(network, config, start=5)
    means = []
    for step in range(1, 11):
        network.weight.data.fill_(step**2)
        average.update(step)
        means.append(average.network.weight[0, 0].item())
    assert means == pytest.approx([1, 4, 9, 16, 25, 36, 36, 50, 50, 200 / 3])  # of 6, 8 and 10


OPTIONS = "--data.pad_crop 4 --data.alternate_flips true --ema.last_epochs 15ba --ema.every_steps 2"  # of 19 steps
OPTIONS += " --checkpoint.every_steps 1 --checkpoint.keep 9"


def test_a_run_with_all_of_it_resumes_bit_identically(root, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.call(root, whole, *OPTIONS.split(), "--train.max_steps", "8")
    for last in ("6", "8"):
        runs.call(root, cut, *OPTIONS.split(), "--train.max_steps", last)
    assert runs.repeatable(cut) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(cut, 8), runs.checkpoint_at(whole, 8))
    assert "val_ema_top1" in runs.rows(whole, "eval")[-1]
    mean = torch.load(runs.checkpoint_at(whole, 8) / "ema.pt", weights_only=True)
    six, eight = (torch.load(runs.checkpoint_at(whole, step) / "model.pt", weights_only=True) for step in (6, 8))
    for key, value in mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (six[key] + eight[key]) / 2)


def test_a_raw_loader_is_refused(squares):
    data = DataConfig(image_size=SIZE, pad_crop=PAD)
    with pytest.raises(UserError, match="raw=True applies no augmentation"):
        TrainLoader(squares.root, batch_size=8, data=data, raw=True)
    images, _ = next(iter(TrainLoader(squares.root, batch_size=8, data=data)))
    assert (images.std((1, 2, 3)) > 0).all() and images.shape == (8, 3, SIZE, SIZE)
