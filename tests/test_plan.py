"""The plan is a pure function of (seed, step): same batches on any number of ranks, each sample once an epoch."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from pipeline.config import AugmentConfig, DataConfig
from pipeline.loader.eval_plan import EvalPlan
from pipeline.loader.plan import TrainPlan, batch_digest
from pipeline.rng import hash_counter, splitmix64


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


def test_repeated_augmentation_sees_every_sample_so_often():
    """Three copies of a sample in a row of the sequence; three epochs see each of them three times, each otherwise."""
    plan = make_plan(samples=100, batch=24, augment=AugmentConfig(repeats=3))
    seen, windows = Counter(), defaultdict(set)
    for step in range(plan.epoch_end(3)):
        batch = plan.local(step)
        for i, (sample, epoch, copy) in enumerate(zip(batch.ids, batch.epochs, batch.copies, strict=True)):
            if epoch < 3:
                seen[int(sample), int(copy)] += 1
                windows[int(sample)].add((*batch.windows[i].tolist(), bool(batch.flips[i])))
    assert set(seen.values()) == {1} and len(seen) == 300
    assert np.mean([len(found) for found in windows.values()]) > 2.9
    assert plan.epoch_end(1) == make_plan(samples=100, batch=24).epoch_end(1)  # an epoch has as many steps as ever
    first = [plan.samples_at(step, 0, 24) for step in range(plan.epoch_end(1))]
    in_first = {int(i) for ids, epochs, _ in first for i, epoch in zip(ids, epochs, strict=True) if epoch == 0}
    assert len(in_first) == 34  # of 100 samples


def test_copies_lie_apart_in_a_batch_and_on_any_rank():
    plan = make_plan(samples=1000, batch=48, augment=AugmentConfig(repeats=3))
    batch = plan.local(5)
    for sample in set(batch.ids.tolist()):
        places = np.flatnonzero(batch.ids == sample)
        assert len(places) <= 3 and (np.diff(places) >= 15).all()
    joined = np.concatenate([plan.local(5, rank, 4).windows for rank in range(4)])
    np.testing.assert_array_equal(joined, batch.windows)


def test_repeats_go_on_in_another_order_when_asked_to():
    plan, other = (make_plan(samples=100, batch=24, augment=AugmentConfig(repeats=3)) for _ in range(2))
    other.reshuffle([4])
    for step in range(4):
        np.testing.assert_array_equal(plan.local(step).ids, other.local(step).ids)
    assert not np.array_equal(plan.local(5).ids, other.local(5).ids)
    seen = Counter()
    for step in range(other.epoch_end(3)):
        ids, epochs, _ = other.samples_at(step, 0, 24)
        seen.update(ids[epochs < 3].tolist())
    assert set(seen.values()) == {3}


def test_digest_covers_what_is_drawn_and_only_that():
    everything = AugmentConfig(policy="trivialaugment", jitter=(0.1,) * 4, random_erase=0.5, mixup=0.2, cutmix=1.0)
    plan, plain = make_plan(augment=everything), make_plan()
    batch = plan.local(0)
    digest = plan.digest(0, batch.ids)
    assert digest == batch_digest(batch.ids, batch.windows, batch.flips, batch.augment_params, batch.mixing)
    without = batch_digest(batch.ids, batch.windows, batch.flips)
    assert without == plain.digest(0, batch.ids) == DIGESTS[0]  # windows and flips are as without augmentation
    drawn, mixing = batch.augment_params, batch.mixing
    for part, name in [(drawn, n) for n in ("ops", "amounts", "erased")] + [
        (mixing, n) for n in ("blends", "boxes", "shares")
    ]:
        array = getattr(part, name).copy()
        array[17] = array[17] + 1
        changed = replace(part, **{name: array})
        parts = (changed, mixing) if part is drawn else (drawn, changed)
        assert digest != batch_digest(batch.ids, batch.windows, batch.flips, *parts), name


def test_augmented_digests_never_change():
    """As above: what is drawn is part of the format."""
    everything = AugmentConfig(
        policy="randaugment-timm", magnitude=7, magnitude_std=0.5, jitter=(0.1,) * 4, random_erase=0.5, mixup=0.2,
        cutmix=1.0, repeats=3,
    )  # fmt: skip
    plan = make_plan(augment=everything)
    assert plan.digest(12345, plan.local(12345).ids) == "662ea4441b1ae01b"


SIZES = DataConfig(image_size=192, start_size=160, ramp_epochs=(65, 76)).resolve()


def test_sizes_grow_between_epochs_in_multiples_of_32():
    """FFCV's 88 epochs: 160 up to epoch 70, where the line passes 176 (half to even: 5.5 is 6)."""
    sizes = [SIZES.size_at(epoch) for epoch in range(88)]
    assert sizes == [160] * 71 + [192] * 17
    assert SIZES.sizes() == [160, 192]
    ramp = DataConfig(image_size=224, start_size=100, ramp_epochs=(0, 8)).resolve()
    assert [ramp.size_at(epoch) for epoch in range(10)] == [100, 128, 128, 160, 160, 192, 192, 224, 224, 224]
    assert ramp.sizes() == [100, 128, 160, 192, 224]
    assert DataConfig(image_size=176).resolve().sizes() == [176]


def test_the_plan_says_the_size_of_a_step_and_its_digest_holds_it():
    data = DataConfig(image_size=96, start_size=64, ramp_epochs=(1, 1)).resolve()
    plan = make_plan(samples=100, batch=24, size_at=data.size_at, sizes_change=True)
    sizes = [plan.local(step).size for step in range(12)]
    assert sizes == [64] * 9 + [96] * 3  # two epochs are full after 9 steps
    other = make_plan(samples=100, batch=24, size_at=lambda epoch: 96, sizes_change=True)
    ids = plan.local(3).ids
    assert plan.digest(3, ids) != other.digest(3, ids) and plan.digest(10, ids) == other.digest(10, ids)
