"""The plan is a pure function of (seed, step): same batches on any number of ranks, each sample once an epoch."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from pipeline.loader.hashing import hash_counter, splitmix64
from pipeline.loader.plan import EvalPlan, TrainPlan, batch_digest


def make_plan(samples=1000, batch=48, seed=7, **kwargs) -> TrainPlan:
    numbers = np.arange(samples)
    return TrainPlan(60 + numbers * 7919 % 541, 60 + numbers * 6007 % 541, batch, seed, **kwargs)


def test_splitmix64_is_the_published_generator():
    # first outputs of the reference implementation for the seed 1234567
    gamma = 0x9E3779B97F4A7C15
    states = [(1234567 + i * gamma) % 2**64 for i in range(3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(splitmix64(np.uint64(state))) for state in states] == expected


def test_digests_never_change():
    """Recorded digests must stay checkable: a change of the random stream is a change of the format."""
    plan = make_plan()
    ids = [plan.local(step).ids for step in (0, 12345)]
    assert [plan.digest(step, i) for step, i in zip((0, 12345), ids, strict=True)] == DIGESTS


DIGESTS = ["11f852be30873984", "3de9fb7dab5b64f4"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_global_batch_is_the_same_for_any_world_size(world_size):
    plan = make_plan()
    for step in (0, 20, 21, 10**6):
        parts = [plan.local(step, rank, world_size) for rank in range(world_size)]
        whole = plan.local(step)
        for field in ("ids", "epochs", "windows", "rois", "flips"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, field))


def test_every_sample_once_an_epoch_across_borders():
    plan = make_plan(samples=1000, batch=48)  # 48 does not divide 1000: batches lie across the borders
    seen = {}
    for step in range(plan.epoch_end(3)):
        batch = plan.local(step)
        for sample, epoch in zip(batch.ids, batch.epochs, strict=True):
            seen.setdefault(int(epoch), []).append(int(sample))
    for epoch in range(3):
        assert sorted(seen[epoch]) == list(range(1000))
    assert seen[0] != seen[1]
    assert plan.epochs_done(plan.epoch_end(2)) == 2
    assert plan.epochs_done(plan.epoch_end(2) - 1) == 1


def test_seed_and_epoch_change_order_windows_and_flips():
    one, other = make_plan(seed=1), make_plan(seed=2)
    assert not np.array_equal(one.local(0).ids, other.local(0).ids)
    ids = np.arange(500)
    first, second = one.cut(ids, np.zeros(500, int)), one.cut(ids, np.ones(500, int))
    assert (first.windows != second.windows).any(1).mean() > 0.95
    assert 0.4 < (first.flips != second.flips).mean() < 0.6
    assert 0.4 < first.flips.mean() < 0.6


def test_windows_lie_inside_and_follow_the_sample():
    plan = make_plan()
    ids = np.random.default_rng(3).permutation(1000)
    cut = plan.cut(ids, np.zeros(1000, int))
    left, top, width, height = cut.windows.T
    assert (left >= 0).all() and (top >= 0).all() and (width > 0).all() and (height > 0).all()
    assert (left + width <= plan.widths[ids]).all() and (top + height <= plan.heights[ids]).all()
    alone = plan.cut(ids[17:18], np.zeros(1, int))
    np.testing.assert_array_equal(alone.windows[0], cut.windows[17])


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (900, 250)])
def test_windows_are_distributed_as_torchvisions(size):
    """Kolmogorov-Smirnov over area, ratio and position; 900 x 250 often needs the fallback window."""
    width, height = size
    count = 4000
    plan = TrainPlan(np.full(count, width), np.full(count, height), 8, seed=5)
    ours = plan.cut(np.arange(count), np.zeros(count, int)).windows
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)])
    theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width -> left, top, width, height
    for name, ours_value, theirs_value in (
        ("area", ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]),
        ("ratio", ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]),
        ("left", ours[:, 0], theirs[:, 0]),
        ("top", ours[:, 1], theirs[:, 1]),
    ):
        assert ks_2samp(ours_value, theirs_value).pvalue > 0.001, name


def test_fallback_window_is_torchvisions():
    """An image of 100:1 never fits: the whole height and the largest allowed width, in the middle."""
    plan = TrainPlan(np.array([10_000]), np.array([100]), 1, seed=0, area=(0.5, 1.0))
    left, top, width, height = plan.cut(np.array([0]), np.array([0])).windows[0]
    assert (width, height, top, left) == (133, 100, 0, (10_000 - 133) // 2)


def test_digest_depends_on_ids_windows_and_flips():
    batch = make_plan().local(3)
    digest = batch_digest(batch.ids, batch.windows, batch.flips)
    assert digest == make_plan().digest(3, batch.ids)
    assert digest != batch_digest(batch.ids[::-1], batch.windows, batch.flips)
    assert digest != batch_digest(batch.ids, batch.windows + 1, batch.flips)
    assert digest != batch_digest(batch.ids, batch.windows, ~batch.flips)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 6, 50, 101])
def test_every_validation_image_exactly_once(world_size, samples):
    plan = EvalPlan(np.full(samples, 100), np.full(samples, 80), 8, 64, 56)
    seen = []
    for rank in range(world_size):
        for step in range(plan.steps(world_size)):
            seen += plan.local(step, rank, world_size).ids.tolist()
    assert sorted(seen) == list(range(samples))


def test_hash_counter_tells_its_parts_apart():
    assert hash_counter(1, 2) != hash_counter(2, 1)
    assert len(set(hash_counter(0, np.arange(10_000)).tolist())) == 10_000


def test_substitutes_follow_from_the_sample_alone():
    plan = make_plan()
    first = [plan.substitute(5, attempt) for attempt in range(20)]
    assert first == [make_plan().substitute(5, attempt) for attempt in range(20)]
    assert len(set(first)) > 15 and all(0 <= sample < 1000 for sample in first)
