"""mixup, CutMix and erasing: hand-worked values, torchvision's pixels, and the same for any number of ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from complaints import complaint
from torch import nn
from torchvision.transforms import v2

from pipeline.augment.apply import EraseAndMix
from pipeline.augment.mixing import apply_erase_mix, partners, soft_targets
from pipeline.augment.ops import apply_ops
from pipeline.config import AugmentConfig, DataConfig, RawConfig, TrainConfig, parse_config
from pipeline.dataset.index.scan import build_index
from pipeline.errors import UserError
from pipeline.loader import build
from pipeline.loader import stream as stream_module
from pipeline.loader.build import check_shares
from pipeline.loader.plan import make_train_plan
from pipeline.rank_info import RankInfo
from pipeline.training.step import NormalizeEraseMix

NOWHERE = [0, 0, 0, 0]
EVERYTHING = AugmentConfig(
    policy="randaugment-timm",
    magnitude=7.0,
    magnitude_std=0.5,
    interpolation="bilinear",
    jitter=(0.2, 0.2, 0.2, 0.1),
    random_erase=0.5,
    repeats=3,
    mixup=0.2,
    cutmix=1.0,
    mix_prob=0.8,
    mix_group=3,
)


def how(blends, boxes, shares, erased=None):
    boxes, erased = (None if b is None else torch.tensor(b, dtype=torch.int32) for b in (boxes, erased))
    return EraseAndMix(erased, torch.tensor(blends), boxes, torch.tensor(shares))


def test_mixup_by_hand():
    """Shares 0.75 and 0.25: of the values 4, 8, 0 in a group of three, each with the one before it."""
    pixels = torch.tensor([4.0, 8.0, 0.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    mixed = apply_erase_mix(pixels, how([0.75] * 3, [NOWHERE] * 3, [0.75] * 3), 3)
    assert mixed[:, 0, 0, 0].tolist() == [0.75 * 4, 0.75 * 8 + 0.25 * 4, 0.25 * 8]
    targets = soft_targets(torch.tensor([2, 0, 2]), torch.tensor([0.75] * 3), 3, 4)
    assert targets.tolist() == [[0, 0, 1, 0], [0.75, 0, 0.25, 0], [0.25, 0, 0.75, 0]]
    assert targets.dtype == torch.float32


def test_cutmix_by_hand():
    """A box of 2 x 1 of 12 pixels comes from the partner; the label keeps 10 of 12."""
    pixels = torch.stack([torch.full((3, 3, 4), 1.0), torch.full((3, 3, 4), 2.0)])
    mixed = apply_erase_mix(pixels, how([1.0, 1.0], [[1, 2, 2, 1]] * 2, [10 / 12] * 2), 2)
    assert mixed[0, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 2, 2, 1]]
    assert mixed[1, 2].tolist() == [[2, 2, 2, 2], [2, 2, 2, 2], [2, 1, 1, 2]]
    targets = soft_targets(torch.tensor([0, 1]), torch.tensor([10 / 12] * 2), 2, 2)
    torch.testing.assert_close(targets, torch.tensor([[10 / 12, 2 / 12], [2 / 12, 10 / 12]]))


def test_erasing_by_hand():
    """Before mixing: what was erased (0, the mean color) goes to the partner, too."""
    pixels = torch.full((2, 3, 2, 2), 4.0)
    erased = apply_erase_mix(pixels, how([0.5, 0.5], [NOWHERE] * 2, [0.5] * 2, [[1, 0, 1, 2], NOWHERE]), 2)
    assert erased[:, 1].tolist() == [[[4, 2], [4, 2]]] * 2


@pytest.mark.parametrize("group", [2, 6])
def test_a_group_is_mixed_as_torchvision_mixes_a_batch(group):
    torch.manual_seed(3)
    pixels, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0])
    for theirs in (v2.MixUp(alpha=0.4, num_classes=5), v2.CutMix(alpha=1.0, num_classes=5)):
        expected, blends, boxes, shares = [], [], [], []
        for part, names in zip(pixels.split(group), labels.split(group), strict=True):
            state = torch.get_rng_state()
            params = theirs.make_params([part])
            torch.set_rng_state(state)
            expected.append(theirs(part, names))
            x1, y1, x2, y2 = params.get("box", NOWHERE)
            boxes += [[int(x1), int(y1), int(x2 - x1), int(y2 - y1)]] * group
            blends += [float(params.get("lam", 1.0))] * group
            shares += [float(params.get("lam_adjusted", params.get("lam")))] * group
        found = apply_erase_mix(pixels, how(blends, boxes, shares), group)
        torch.testing.assert_close(found, torch.cat([images for images, _ in expected]), rtol=1e-6, atol=1e-6)
        found = soft_targets(labels, torch.tensor(shares), group, 5)
        torch.testing.assert_close(found, torch.cat([targets for _, targets in expected]))


def test_partners_stay_in_their_group():
    assert partners(torch.arange(6), 3).tolist() == [2, 0, 1, 5, 3, 4]


@pytest.fixture(scope="module")
def index(synthetic_root):
    return build_index(synthetic_root)


def seen(index, step, world_size):
    """What the networks of all ranks see in a step, in the order of the global batch: pixels, soft targets, ids."""
    data = DataConfig(loader="reference", image_size=48, val_size=48, val_resize=48, interpolation="bicubic").resolve()
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=24, seed=3), EVERYTHING)
    whole = NormalizeEraseMix(nn.Identity(), data.mean, data.std, True, EVERYTHING.mix_group)
    parts = []
    for rank in range(world_size):
        stream = build.make_train_stream(index, plan, data, RankInfo(rank, world_size), applies=EVERYTHING)
        (batch,) = stream.batches(step, step + 1)
        images = apply_ops(batch.images, batch.pixel_ops, EVERYTHING.interpolation, None)
        targets = soft_targets(batch.targets, batch.erase_mix.shares, EVERYTHING.mix_group, 4)
        parts.append((whole(images, batch.erase_mix), targets, batch.ids, batch.images))
        stream.close()
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def test_pixels_and_targets_are_the_same_for_any_world_size(index):
    alone = seen(index, 7, 1)
    for world_size in (2, 4):
        shared = seen(index, 7, world_size)
        assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True)), world_size
    pixels, targets, ids, plain = alone
    assert ((targets > 0).sum(1) == 2).any()  # something was mixed, ...
    data = DataConfig().resolve()
    untouched = NormalizeEraseMix(nn.Identity(), data.mean, data.std, True, 3)(plain)
    assert ((pixels != untouched).flatten(1).any(1)).float().mean() > 0.8  # and most images were changed
    assert len(set(ids.tolist())) < 24  # and copies of a sample are in one batch
    pairs = zip(ids.tolist(), partners(ids, 3).tolist(), strict=True)
    assert all(one != other for one, other in pairs)  # but not mixed with each other


def test_a_gpu_gets_batches_whose_pixels_its_loader_has_changed(index, monkeypatch):
    """With a stand-in for the copy to the device."""
    monkeypatch.setattr(stream_module, "prefetch_to_device", lambda batches, device, then: map(then, batches))
    data = DataConfig(loader="reference", image_size=48, val_size=48, val_resize=48).resolve()
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=24, seed=3), EVERYTHING)
    stream = build.make_train_stream(index, plan, data, RankInfo(), applies=EVERYTHING)
    here, stream.device = stream.device, SimpleNamespace(type="cuda")
    batches = stream.batches(0, 1)
    stream.device = here
    (changed,), (plain,) = list(batches), list(stream.batches(0, 1))
    stream.close()
    assert plain.pixel_ops is not None and changed.pixel_ops is None
    assert torch.equal(changed.augmented(EVERYTHING), plain.augmented(EVERYTHING))
    assert torch.equal(changed.images, plain.augmented(EVERYTHING)) and not torch.equal(changed.images, plain.images)


def test_a_micro_batch_sees_its_part(index):
    data = DataConfig(loader="reference", image_size=32, val_size=32, val_resize=32).resolve()
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=24, seed=3), EVERYTHING)
    stream = build.make_train_stream(index, plan, data, RankInfo(), applies=EVERYTHING)
    (batch,) = stream.batches(0, 1)
    stream.close()
    pixels = torch.rand(24, 3, 32, 32)
    pieces = zip(pixels.split(9), batch.erase_mix.split(9), strict=True)
    assert torch.equal(
        torch.cat([apply_erase_mix(*piece, 3) for piece in pieces]), apply_erase_mix(pixels, batch.erase_mix, 3)
    )


def test_a_group_that_ranks_would_split_is_one_line():
    config = RawConfig(augment=AugmentConfig(mixup=0.2, mix_group=4), train=TrainConfig(global_batch_size=24)).resolve()
    check_shares(config, 2)
    with pytest.raises(UserError) as caught:
        check_shares(config, 4)
    line = str(caught.value)
    assert all(word in line for word in ("--augment.mix_group 4", "6 images", "4 ranks", "divisor of 6"))
    assert "\n" not in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["mixup", "-1"], ["--augment.mixup", "0 or more"]),
        (["cutmix", "-0.5"], ["--augment.cutmix", "0 or more"]),
        (["mix_prob", "1.5"], ["--augment.mix_prob", "0 to 1"]),
        (["mixup_switch_prob", "-0.1"], ["--augment.mixup_switch_prob"]),
        (["mix_group", "1"], ["--augment.mix_group", "at least 2"]),
        (["mix_group", "3", "--augment.mixup", "1"], ["--augment.mix_group", "3", "global_batch_size 256"]),
        (["mixup", "1", "--train.micro_batch_size", "5"], ["--augment.mix_group", "2", "micro_batch_size 5"]),
        (["policy", "mine"], ["augment.policy", "mine", "trivialaugment"]),
        (["magnitude", "31", "--augment.policy", "randaugment"], ["--augment.magnitude", "31", "0 to 30"]),
        (["magnitude", "11", "--augment.policy", "randaugment-timm"], ["--augment.magnitude", "0 to 10"]),
        (["magnitude_std", "-1"], ["--augment.magnitude_std"]),
        (["num_ops", "0"], ["--augment.num_ops", "above 0"]),
        (["fill", "[0, 0, 256]"], ["--augment.fill", "255"]),
        (["jitter", "[0.1, 0.1, 0.1, 0.6]"], ["--augment.jitter", "0.5"]),
        (["jitter", "[-0.1, 0.1, 0.1, 0.1]"], ["--augment.jitter", "0 or more"]),
        (["random_erase", "2"], ["--augment.random_erase", "0 to 1"]),
        (["erase_area", "[0.5, 0.1]"], ["--augment.erase_area", "smallest"]),
        (["erase_ratio", "[0, 1]"], ["--augment.erase_ratio", "smallest"]),
        (["repeats", "0"], ["--augment.repeats", "above 0"]),
        (["repeats", "200"], ["--augment.repeats", "half of train.global_batch_size"]),
        (["interpolation", "lanczos"], ["augment.interpolation", "bilinear"]),
    ],
)
def test_impossible_values_are_one_clear_line(argv, words, capsys):
    line = complaint(capsys, f"--augment.{argv[0]}", *argv[1:])
    assert all(word in line for word in words), line


def test_recipes_of_the_field_can_be_written(tmp_path):
    """A file with every knob reads back as it was."""
    from pipeline.config import to_yaml

    config = parse_config(["--augment.policy", "trivialaugment", "--augment.jitter", "[0.4, 0.4, 0.4, 0.1]"])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert parse_config(["--config", str(tmp_path / "c.yaml")]) == config
    assert np.isclose(config.augment.jitter, (0.4, 0.4, 0.4, 0.1)).all()
