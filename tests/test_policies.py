"""What is drawn has the laws of the published policies, and follows the sample alone."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import beta, chisquare, ks_2samp, kstest
from torchvision.transforms import v2
from torchvision.transforms.v2 import _auto_augment

from pipeline.augment.params import sample_erase_boxes, sample_mixing
from pipeline.augment.policies import AUTO, CODE, OPS, RAND, WIDE, sample_ops
from pipeline.config import AugmentConfig
from pipeline.rng import hash_counter, symmetric_beta

COUNT, SIZE = 20_000, 224
KEYS = hash_counter(11, np.arange(COUNT))
OTHER = hash_counter(12, np.arange(COUNT))
NAMES = {"Color": "color", "AutoContrast": "autocontrast"}
SIGNED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness"}


def draw(**settings):
    ops, amounts = sample_ops(AugmentConfig(**settings), KEYS, OTHER, SIZE)
    return np.array(OPS)[ops], amounts


def ours_as_torchvision(op, amount):
    """An amount in the terms of torchvision's classes, rounded to five digits."""
    if op in ("brightness", "color", "contrast", "sharpness"):
        amount = amount - 1
    if op == "solarize":
        amount = amount / 255
    return round(float(amount), 5) + 0.0


class Recorder:
    """torchvision's transform, which only writes down what it would do."""

    def __init__(self, transform, monkeypatch):
        self.seen = []

        def note(_, image, transform_id, magnitude, **kwargs):
            name = "".join("_" + c.lower() if c.isupper() else c for c in transform_id).lstrip("_")
            name = {"auto_contrast": "autocontrast"}.get(name, name)
            whole = name.startswith("translate") or name == "posterize"
            self.current.append((name, round(float(int(magnitude) if whole else magnitude), 5) + 0.0))
            return image

        monkeypatch.setattr(_auto_augment._AutoAugmentBase, "_apply_image_or_video_transform", note)
        self.transform = transform

    def draw(self, count):
        image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        for _ in range(count):
            self.current = []
            self.transform(image)
            self.seen.append(tuple(self.current))
        return self.seen


@pytest.mark.parametrize(
    ("settings", "transform"),
    [
        ({"policy": "randaugment", "num_ops": 1, "magnitude": 9}, v2.RandAugment(1, 9)),
        ({"policy": "trivialaugment"}, v2.TrivialAugmentWide()),
        ({"policy": "autoaugment"}, v2.AutoAugment()),
    ],
    ids=["randaugment", "trivialaugment", "autoaugment"],
)
def test_policies_have_torchvisions_law(settings, transform, monkeypatch):
    """Ops together with their amounts: the same values, as often (chi-squared, of those that are not rare)."""
    torch.manual_seed(0)
    theirs = Counter(Recorder(transform, monkeypatch).draw(6000))
    ops, amounts = draw(**settings)
    ours = Counter()
    for names, values in zip(ops, amounts, strict=True):
        kept = [(n, ours_as_torchvision(n, v)) for n, v in zip(names, values, strict=True)]
        identity_is_an_op = settings["policy"] != "autoaugment"  # else it is an op that was left out
        ours[tuple((n, v) for n, v in kept if n != "identity" or identity_is_an_op)] += 1
    strange = sum(count for key, count in theirs.items() if key not in ours)
    assert strange <= 3 and set(ours) - set(theirs) <= {k for k, n in ours.items() if n < 80}  # the rest is too rare
    common = [key for key, n in ours.items() if n * 6000 / COUNT >= 5 and theirs[key]]
    expected = np.array([ours[key] for key in common], float)
    found = np.array([theirs[key] for key in common], float)
    assert chisquare(found, expected * found.sum() / expected.sum()).pvalue > 0.001


def test_timms_increasing_randaugment_by_hand():
    """m7: rotate 21 degrees, factors 1 -+ 0.63, 4 - int(2.8) bits, threshold 256 - int(179.2), + int(77), ..."""
    ops, amounts = draw(policy="randaugment-timm", magnitude=7)
    expected = {
        "rotate": {21.0, -21.0},
        "posterize": {2.0},
        "solarize": {77.0},
        "solarize_add": {77.0},
        "color": {1.63, 0.37},
        "sharpness": {1.63, 0.37},
        "shear_x": {0.21, -0.21},
        "translate_y": {round(0.45 * 0.7 * SIZE, 4), round(-0.45 * 0.7 * SIZE, 4)},
        "invert": {0.0},
    }
    for name, values in expected.items():
        found = {round(float(v), 4) for v in amounts[ops == name]}
        assert found == values, name
    left_out = (ops == "identity").mean()
    assert abs(left_out - 0.5) < 0.01  # every op is made half of the times
    shares = Counter(ops[ops != "identity"].tolist())
    assert len(shares) == 15 and chisquare(list(shares.values())).pvalue > 0.001


def test_the_strengths_standard_deviation():
    ops, amounts = draw(policy="randaugment-timm", magnitude=7, magnitude_std=0.5)
    strength = np.abs(amounts[ops == "rotate"]) / 3
    assert kstest(strength, "norm", args=(7, 0.5)).pvalue > 0.001
    ops, amounts = draw(policy="randaugment", magnitude=28, magnitude_std=5)
    assert np.abs(amounts[ops == "rotate"]).max() == 30  # never beyond the scale


def test_colour_jitter_has_torchvisions_law():
    jitter = (0.4, 0.3, 1.5, 0.1)
    ops, amounts = draw(jitter=jitter)
    theirs = v2.ColorJitter(*jitter)
    torch.manual_seed(0)
    drawn = [theirs.make_params([]) for _ in range(4000)]
    keys = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for name, key in zip(("brightness", "contrast", "color", "hue"), keys, strict=True):
        assert ks_2samp(amounts[ops == name], [params[key] for params in drawn]).pvalue > 0.001, name
    orders = Counter(map(tuple, ops.tolist()))
    assert len(orders) == math.factorial(4) and chisquare(list(orders.values())).pvalue > 0.001
    only_hue, _ = draw(jitter=(0, 0, 0, 0.5))
    assert set(only_hue.ravel().tolist()) == {"identity", "hue"} and ((only_hue == "hue").sum(1) == 1).all()


def test_erasing_has_torchvisions_law():
    boxes = sample_erase_boxes(AugmentConfig(random_erase=0.3), KEYS, SIZE)
    drawn = boxes[boxes[:, 2] > 0]
    assert abs(len(drawn) / COUNT - 0.3) < 0.015
    assert (drawn[:, :2] >= 0).all() and (drawn[:, :2] + drawn[:, 2:] <= SIZE).all()
    transform = v2.RandomErasing(p=1.0)
    torch.manual_seed(0)
    image = torch.zeros(3, SIZE, SIZE)
    theirs = [transform.make_params([image]) for _ in range(4000)]
    for name, ours in (("j", drawn[:, 0]), ("i", drawn[:, 1]), ("w", drawn[:, 2]), ("h", drawn[:, 3])):
        assert ks_2samp(ours, [params[name] for params in theirs]).pvalue > 0.001, name


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.5])
def test_beta_distribution(alpha):
    assert kstest(symmetric_beta(OTHER, alpha), beta(alpha, alpha).cdf).pvalue > 0.001


def test_mixing_has_its_laws():
    """One draw a group; mixup's share is beta(a, a); CutMix's box has torchvision's corners for its share."""
    c = AugmentConfig(mixup=0.2, cutmix=1.0, mix_prob=0.8, mixup_switch_prob=0.3, mix_group=4)
    mixing = sample_mixing(c, np.uint64(5), 0, 4 * COUNT, SIZE)
    for array in (mixing.blends, mixing.boxes, mixing.shares):
        groups = array.reshape(COUNT, 4, -1)
        assert (groups == groups[:, :1]).all()
    blends, boxes, shares = (array[::4] for array in (mixing.blends, mixing.boxes, mixing.shares))
    mixed, cut = (blends < 1) | (boxes[:, 2] > 0), boxes[:, 2] > 0
    plain = ~cut & (blends < 1)
    assert abs(cut.mean() - 0.8 * 0.3) < 0.015  # a little less: some boxes have no pixel
    assert abs(mixed.mean() - 0.8) < 0.03
    assert kstest(blends[plain], beta(0.2, 0.2).cdf).pvalue > 1e-6 and (shares[plain] == blends[plain]).all()
    np.testing.assert_allclose(shares[cut], 1 - boxes[cut, 2] * boxes[cut, 3] / SIZE**2, rtol=1e-6)
    assert (shares[~mixed] == 1).all()
    torch.manual_seed(0)
    theirs = v2.CutMix(alpha=1.0, num_classes=2)
    batch = torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, dtype=torch.int64)
    drawn = [theirs.make_params([batch[0]]) for _ in range(3000)]
    kept = [(p["box"], p["lam_adjusted"]) for p in drawn]
    left = [b[0] for b, lam in kept if lam < 1]
    assert ks_2samp(boxes[cut, 0], left).pvalue > 0.001
    assert ks_2samp(shares[cut], [lam for _, lam in kept if lam < 1]).pvalue > 0.001


def test_draws_follow_the_sample():
    """A sample alone, or among others, in any order: the same."""
    c = AugmentConfig(policy="randaugment", magnitude_std=1.0, jitter=(0.1, 0.1, 0.1, 0.1), random_erase=0.5)
    some = np.array([7, 3, 400])
    for whole, part in zip(sample_ops(c, KEYS, OTHER, 64), sample_ops(c, KEYS[some], OTHER[some], 64), strict=True):
        np.testing.assert_array_equal(whole[some], part)
    np.testing.assert_array_equal(sample_erase_boxes(c, KEYS, 64)[some], sample_erase_boxes(c, KEYS[some], 64))
    assert CODE["identity"] == 0


@pytest.mark.parametrize(
    "space, share", [(WIDE, None), (RAND, 150 / 331), (AUTO, 150 / 331)], ids=["wide", "rand", "auto"]
)
def test_shifts_are_the_whole_pixels_that_torchvision_takes(space, share):
    """int() of torch.linspace's float32 values: half of TrivialAugment's 32 pixels are 15."""
    for size in (32, 64, 96, 128, 160, 176, 192, 224, 288, 299, 331):
        theirs = torch.linspace(0.0, 32.0 if space is WIDE else 150 / 331 * size, space.levels).int().tolist()
        ops = np.full(space.levels, CODE["translate_x"])
        strength = np.arange(space.levels) / (space.levels - 1)
        for sign in (1, -1):
            ours = space.amounts(ops, strength, np.full(space.levels, float(sign)), size)
            assert ours.tolist() == [sign * pixels for pixels in theirs], size
