"""Every recipe of ImageNet: three steps of it on tiny data, and its rates and weight decays as its paper has them."""

import math

import pytest
import runs
import torch
from torch import nn

from pipeline.__main__ import main
from pipeline.config import Config, parse_config
from pipeline.dataset.index.scan import build_index
from pipeline.insight.recipes import recipes
from pipeline.model.build import build_model
from pipeline.training.optim.ema import effective_decay
from pipeline.training.optim.lr_schedule import Schedule, peak_lr
from pipeline.training.optim.optimizer import make_optimizer

IMAGES = 1_281_167

#: recipe -> ({epoch: learning rate}, weight decay of convolutions, BatchNorm, the head's weight, the head's bias)
COSINE_A = {n: 1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * 5 / n)) / 2 for n, lr in ((600, 5e-3), (300, 5e-3))}
PAPERS = {
    "resnet152-he2015": ({0: 0.1, 29.9: 0.1, 30: 0.01, 60: 1e-3, 90: 1e-4, 119: 1e-4}, (1e-4, 1e-4, 1e-4, 1e-4)),
    "resnet152-torchvision-v1": ({0: 0.1, 29.9: 0.1, 30.1: 0.01, 60.1: 1e-3, 89.9: 1e-3}, (1e-4, 1e-4, 1e-4, 1e-4)),
    "resnet152-torchvision-v2": (
        {0: 0.005, 2.5: 0.2525, 5: 0.5, 302.5: 0.25, 501.666667: 0.5 * (1 + math.cos(math.pi * 496.666667 / 595)) / 2},
        (2e-5, 0, 2e-5, 2e-5),
    ),
    "resnet152-goyal": (
        {0: 0.1, 2.5: 1.65, 5: 3.2, 29.9: 3.2, 30.1: 0.32, 60.1: 0.032, 79.9: 0.032, 80.1: 0.0032},
        (1e-4, 0, 1e-4, 1e-4),
    ),
    "resnet152-a1": ({0: 1e-4, 5: COSINE_A[600], 300: (5e-3 + 1e-6) / 2}, (0.01, 0, 0.01, 0)),
    "resnet152-a2": ({0: 1e-4, 5: COSINE_A[300], 150: (5e-3 + 1e-6) / 2}, (0.02, 0, 0.02, 0)),
    "resnet152-a3": ({0: 1e-4, 2.5: (1e-4 + 8e-3) / 2, 50: (8e-3 + 1e-6) / 2}, (0.02, 0, 0.02, 0)),
    "resnet50-ffcv-16": ({0: 1.7e-4, 1: 0.850085, 2: 1.7, 9: 0.85, 15: 1.7 / 14}, (1e-4, 0, 1e-4, 1e-4)),
    "resnet50-ffcv-88": ({0: 1.7e-4, 1: 0.850085, 2: 1.7, 45: 0.85, 87: 1.7 / 86}, (1e-4, 0, 1e-4, 1e-4)),
    "resnet50-dle-90": ({0: 0, 4: 1.024, 8: 2.048, 49: 1.024}, (2**-15, 0, 2**-15, 2**-15)),
    "resnet152": ({0: 0.005, 5: 0.5, 302.5: 0.25}, (2e-5, 0, 2e-5, 0)),
    "resnet152-fast": ({0: 8.5e-5, 2: 0.85, 19: 0.425}, (5e-5, 0, 5e-5, 0)),
}
PUBLISHED_BATCH = {"resnet152-goyal": 8192, "resnet152-torchvision-v2": 1024, "resnet50-ffcv-16": 4096}


def schedule_of(config: Config) -> tuple[Schedule, float]:
    per_epoch = IMAGES / config.train.global_batch_size
    return Schedule(config.schedule, peak_lr(config.optim, config.train.global_batch_size), per_epoch), per_epoch


@pytest.mark.parametrize("name", PAPERS)
def test_the_learning_rate_is_the_papers(name):
    schedule, per_epoch = schedule_of(parse_config(["--config", name]))
    for epoch, lr in PAPERS[name][0].items():
        assert schedule.lr(math.ceil(epoch * per_epoch - 1e-6)) == pytest.approx(lr, rel=4e-3), f"epoch {epoch}"


def test_lengths_and_batches_are_the_papers():
    assert schedule_of(parse_config(["--config", "resnet152-he2015"]))[0].total_steps == 600_000
    for name, batch in PUBLISHED_BATCH.items():
        assert parse_config(["--config", name]).train.global_batch_size == batch
    v2 = parse_config(["--config", "resnet152-torchvision-v2"])
    assert effective_decay(v2) == pytest.approx(1 - (1 - 0.99998) * 1024 * 32 / 600, abs=1e-7)  # torchvision's formula


@pytest.mark.parametrize("name", PAPERS)
def test_the_weight_decays_are_the_papers(name):
    """The real network, built without data."""
    config = parse_config(["--config", name])
    with torch.device("meta"):
        model = build_model(config.model, 1000)
    decays = {id(p): g["weight_decay"] for g in make_optimizer(model, config.optim).param_groups for p in g["params"]}
    modules = list(model.modules())
    kinds = [
        [m.weight for m in modules if isinstance(m, nn.Conv2d)],
        [p for m in modules if isinstance(m, nn.BatchNorm2d) for p in (m.weight, m.bias)],
        [model.fc.weight],
        [model.fc.bias],
    ]
    assert sum(map(len, kinds)) == len(decays)
    found = [{decays[id(parameter)] for parameter in kind} for kind in kinds]
    assert found == [{decay} for decay in PAPERS[name][1]]


@pytest.fixture(scope="module")
def root(synthetic_root):
    build_index(synthetic_root)
    return synthetic_root


SMALL = ["--data.image_size", "32", "--data.val_size", "32", "--data.val_resize", "36", "--data.val_crop_ratio", "null"]
SMALL += ["--data.start_size", "null", "--data.ramp_epochs", "null"]
QUIET = ["--tracking.wandb", "disabled", "--tracking.report", "false", "--train.precision", "fp32"]


@pytest.mark.parametrize("name", PAPERS)
def test_three_steps(name, root, tmp_path):
    """With ResNet-18 in place of the deep one, but for one recipe, which runs as it is. (`resnet152` as it is:
    test_real_images.)"""
    network = [] if name == "resnet50-dle-90" else ["--model.name", "resnet18"]
    options = [*network, *SMALL, *QUIET, "--train.global_batch_size", "8", "--train.max_steps", "3"]
    runs.call(root, tmp_path / "run", *options, recipe=name)
    rows = runs.rows(tmp_path / "run", "train")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(isinstance(row["loss"], float) and "skipped" not in row for row in rows)
    scores = runs.rows(tmp_path / "run", "eval")[-1]
    assert scores["images"] == 24
    assert ("val_ema_top1" in scores) == (parse_config(["--config", name]).ema.decay > 0)


def test_the_list_has_lengths_results_and_the_hours_of_a_card(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.config.recipe_names", lambda: ["resnet50-dle-90", "smoke"])
    recipes(card="a100-80gb")
    listed = capsys.readouterr().out
    assert "90 epochs, batch 2,048; at least 15 GPU-hours on a100-80gb" in listed and "77.12 top-1" in listed
    assert "5 epochs, batch 32\n" in listed
    assert main(["recipes", "--card", "abacus"]) == 2
    assert "--card abacus" in capsys.readouterr().err
