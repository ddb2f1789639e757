"""A run with all augmentation on at once: bit-exact where it is resumed, the same batches on any number of ranks, one
compilation a size."""

from collections import Counter

import pytest
import runs
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from pipeline.config import parse_config
from pipeline.dataset.index.scan import build_index
from pipeline.loader.plan import make_train_plan

ALL_ON = """
data: {image_size: 32, start_size: 24, ramp_epochs: [0, 1], interpolation: bicubic, val_crop_ratio: 0.875}
augment:
  policy: randaugment-timm
  magnitude: 7
  magnitude_std: 0.5
  interpolation: bilinear
  fill: [124, 116, 104]
  jitter: [0.2, 0.2, 0.2, 0.05]
  random_erase: 0.5
  repeats: 3
  mixup: 0.2
  cutmix: 1.0
  mix_prob: 0.9
  mix_group: 5
train: {micro_batch_size: 10, precision: fp32}
"""
STEPS = 7  # an epoch is full after 5 steps; then images have 32 px a side instead of 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """tests/tiny.yaml with everything on."""
    import yaml

    path = tmp_path_factory.mktemp("recipe") / "all-on.yaml"
    tiny, more = yaml.safe_load(runs.TINY.read_text()), yaml.safe_load(ALL_ON)
    for name in ("image_size", "val_size", "val_resize"):
        tiny["data"].pop(name)
    path.write_text(yaml.safe_dump(tiny | {name: tiny.get(name, {}) | group for name, group in more.items()}))
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(root, recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    runs.call(root, run, "--train.max_steps", str(STEPS), recipe=recipe)
    return run


def digests(run):
    return [row["batch_digest"] for row in runs.rows(run, "train")]


@pytest.mark.long
def test_resumed_is_bit_identical(root, recipe, undisturbed, tmp_path):
    """Cut inside the first epoch, and after the images have grown."""
    for steps in (3, 6, STEPS):
        runs.call(root, tmp_path / "cut", "--train.max_steps", str(steps), recipe=recipe)
    assert runs.repeatable(tmp_path / "cut") == runs.repeatable(undisturbed)
    runs.assert_same_state(runs.checkpoint_at(tmp_path / "cut", STEPS), runs.checkpoint_at(undisturbed, STEPS))


@pytest.mark.long
def test_two_one_two_ranks_see_the_same_batches(root, recipe, undisturbed, tmp_path):
    run = tmp_path / "run"
    runs.train(root, run, "--train.max_steps", "3", recipe=recipe, processes=2)
    runs.call(root, run, "--train.max_steps", "6", recipe=recipe)
    runs.train(root, run, "--train.max_steps", str(STEPS), recipe=recipe, processes=2)
    assert [row["world_size"] for row in runs.rows(run, "event") if "world_size" in row] == [2, 1, 2]
    assert digests(run) == digests(undisturbed)
    # the losses of the first step are of the same pixels and targets, though BatchNorm sees a rank's own
    config = parse_config(["--config", recipe])
    plan = make_train_plan(build_index(root), config.data, config.train, config.augment)
    assert digests(run) == [plan.digest(step, plan.local(step).ids) for step in range(STEPS)]
    epoch = (plan.samples_at(step, 0, 20) for step in range(5))
    seen = Counter((int(i), int(c)) for ids, _, copies in epoch for i, c in zip(ids, copies, strict=True))
    assert set(seen.values()) == {1}


class Mean(nn.Module):
    def forward(self, values):
        return values.mean(2)


def test_one_compilation_a_size(root, recipe, tmp_path, monkeypatch):
    """Sizes 24 and 32, micro batches with and without exchange of gradients: no storm of recompilations."""
    counter, compile_ = CompileCounter(), torch.compile
    frames = []

    def compiled(module, **settings):
        made = compile_(module, backend=counter, **settings)

        def call(images, *rest):
            before = counter.frame_count
            output = made(images, *rest)
            frames.append((images.shape[1], counter.frame_count - before))
            return output

        return call

    def small(config, classes):
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), Mean(), nn.Linear(4, classes))

    monkeypatch.setattr("pipeline.training.setup.build_model", small)
    monkeypatch.setattr("pipeline.training.step.torch.compile", compiled)
    options = ["--train.compile", "--train.max_steps", "7"]
    runs.call(root, tmp_path / "run", *options, recipe=recipe)
    by_size = Counter()
    for size, count in frames:
        by_size[size] += count
    first = {size: next(count for s, count in frames if s == size) for size in (24, 32)}
    assert first[24] > 0 and first[32] == first[24]  # the larger one is compiled as the first was, once, ...
    assert by_size == first  # and at its first batch: 5 + 2 steps of 2 micro batches, and the warm-up, made no other
    assert len(frames) >= 14
