"""Every recipe of ImageNet: three steps of it on tiny data, and its rates and weight decays as its paper has them."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import runs
import scipy.stats
import torch
import yaml
from source_rates import IMAGES, RATES
from torch import nn
from torchvision.models import get_model_weights

from pipeline.__main__ import main
from pipeline.config import Config, parse_config, recipe_names, recipes_folder, semantic_config
from pipeline.insight.recipes import recipes
from pipeline.loader.windows import scale_jitter_windows
from pipeline.model.build import build_model
from pipeline.rng import hash_counter
from pipeline.training.optim.ema import effective_decay
from pipeline.training.optim.lr_schedule import Schedule, peak_lr
from pipeline.training.optim.optimizer import make_optimizer

#: recipe -> weight decay of convolutions, BatchNorm, the head's weight, the head's bias, as its source has them
PAPERS = {
    "resnet152-he2015": (1e-4,) * 4,
    "resnet152-torchvision-v1": (1e-4,) * 4,
    "resnet152-torchvision-v2": (2e-5, 0, 2e-5, 2e-5),
    "resnet152-goyal": (1e-4, 0, 1e-4, 1e-4),
    "resnet152-a1": (0.01, 0, 0.01, 0),
    "resnet152-a1h": (0.01, 0, 0.01, 0),
    "resnet152-a2": (0.02, 0, 0.02, 0),
    "resnet152-a3": (0.02, 0, 0.02, 0),
    "resnet50-ffcv-16": (1e-4, 0, 1e-4, 1e-4),
    "resnet50-ffcv-88": (1e-4, 0, 1e-4, 1e-4),
    "resnet50-dle-90": (2**-15, 0, 2**-15, 2**-15),
}
#: ours, which follow no source
OURS = {
    "resnet152": ({0: 0.005, 5: 0.5, 302.5: 0.25}, (2e-5, 0, 2e-5, 0)),
    "resnet152-fast": ({0: 8.5e-5, 2: 0.85, 19: 0.425}, (5e-5, 0, 5e-5, 0)),
}
DECAYS = PAPERS | {name: decays for name, (_, decays) in OURS.items()}
PUBLISHED_BATCH = {"resnet152-goyal": 8192, "resnet152-torchvision-v2": 1024, "resnet50-ffcv-16": 4096}


def schedule_of(config: Config) -> tuple[Schedule, float]:
    per_epoch = IMAGES / config.train.global_batch_size
    return Schedule(config.schedule, peak_lr(config.optim, config.train.global_batch_size), per_epoch), per_epoch


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_is_the_sources_in_every_epoch(name):
    """At the first, a middle and the last step of each epoch, to 0.1 % of the peak."""
    config = parse_config(["--config", name])
    schedule, per_epoch = schedule_of(config)
    peak = peak_lr(config.optim, config.train.global_batch_size)
    for epoch in range(math.ceil(schedule.total_steps / per_epoch)):
        first = math.ceil(epoch * per_epoch - 1e-6)
        last = min(math.ceil((epoch + 1) * per_epoch - 1e-6), schedule.total_steps) - 1
        for step in (first, (first + last) // 2, last):
            expected = RATES[name](step / per_epoch, epoch)
            assert schedule.lr(step) == pytest.approx(expected, abs=1e-3 * peak), f"epoch {epoch}, step {step}"


@pytest.mark.parametrize("name", OURS)
def test_the_learning_rate_of_our_own_recipes(name):
    schedule, per_epoch = schedule_of(parse_config(["--config", name]))
    for epoch, lr in OURS[name][0].items():
        assert schedule.lr(math.ceil(epoch * per_epoch - 1e-6)) == pytest.approx(lr, rel=4e-3), f"epoch {epoch}"


def test_lengths_and_batches_are_the_papers():
    assert schedule_of(parse_config(["--config", "resnet152-he2015"]))[0].total_steps == 600_000
    for name, batch in PUBLISHED_BATCH.items():
        assert parse_config(["--config", name]).train.global_batch_size == batch
    v2 = parse_config(["--config", "resnet152-torchvision-v2"])
    assert effective_decay(v2) == pytest.approx(1 - (1 - 0.99998) * 1024 * 32 / 600, abs=1e-7)  # torchvision's formula


@pytest.mark.parametrize("name", DECAYS)
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
    assert found == [{decay} for decay in DECAYS[name]]


SMALL = ["--data.image_size", "32", "--data.val_size", "32", "--data.val_resize", "36", "--data.val_crop_ratio", "null"]
SMALL += ["--data.start_size", "null", "--data.ramp_epochs", "null"]
QUIET = ["--tracking.wandb", "disabled", "--tracking.report", "false", "--train.precision", "fp32"]


@pytest.mark.parametrize("name", DECAYS)
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
    assert ("val_ema_top1" in scores) == parse_config(["--config", name]).ema.averages


def test_the_list_has_lengths_results_and_the_hours_of_a_card(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.config.recipe_names", lambda: ["resnet50-dle-90", "smoke"])
    recipes(card="a100-80gb")
    listed = capsys.readouterr().out
    assert "90 epochs, batch 2,048; at least 8 GPU-hours on a100-80gb" in listed and "77.12 top-1" in listed
    assert "5 epochs, batch 32\n" in listed
    assert main(["recipes", "--card", "abacus"]) == 2
    assert "--card abacus" in capsys.readouterr().err


def test_what_a_recipe_says_of_itself_stays_text():
    for name in recipe_names():
        about = parse_config(["--config", name]).about
        written = yaml.safe_load((recipes_folder() / f"{name}.yaml").read_text())["about"]
        assert about == written, name
        differs = about.pop("differs", ["a source"])
        assert isinstance(differs, list) and differs, name
        assert all(isinstance(text, str) and text for text in (*about.values(), *differs)), name


def test_every_recipe_with_a_source_says_how_it_differs():
    for name in recipe_names():
        about = yaml.safe_load((recipes_folder() / f"{name}.yaml").read_text())["about"]
        assert ("differs" in about) != about["source"].startswith("ours"), name


def test_the_list_names_each_difference(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.config.recipe_names", lambda: ["resnet152-a1h"])
    recipes()
    listed = " ".join(capsys.readouterr().out.split())
    assert "differs: the rates of drop-out" in listed and "; bf16 autocast" in listed
    assert "missing: timm has not published" in listed and "['" not in listed


@pytest.mark.parametrize("name", ["resnet152-torchvision-v1", "resnet152-torchvision-v2", "resnet152"])
def test_published_figures_are_those_of_torchvisions_weights(name):
    published = parse_config(["--config", name]).about["published"]
    weights = get_model_weights("resnet152")["IMAGENET1K_V1" if name.endswith("v1") else "IMAGENET1K_V2"]
    metrics = weights.meta["_metrics"]["ImageNet-1K"]
    assert re.findall(r"\d+\.\d+", published)[:2] == [f"{metrics[key]:.3f}" for key in ("acc@1", "acc@5")]


def test_a1h_is_a1_with_stronger_regularization():
    """timm: "stronger dropout, stochastic depth, and RandAugment than paper A1"; all else is A1's."""
    a1, a1h = (semantic_config(parse_config(["--config", f"resnet152-{name}"])) for name in ("a1", "a1h"))
    stronger = {key for key in a1 if a1h[key] != a1[key]}
    assert stronger == {"model.dropout", "model.stochastic_depth", "augment.magnitude"}
    assert all(a1h[key] > a1[key] for key in stronger)


def test_he2015_crops_have_a_uniform_shorter_side():
    """He et al. 2015, section 3.4: a whole number of pixels from 256 to 480, then 224 of them."""
    config = parse_config(["--config", "resnet152-he2015"])
    assert config.data.shorter_side == (256, 480)
    keys = hash_counter(0, np.arange(100_000))
    widths, heights = np.full(100_000, 60_000), np.full(100_000, 45_000)  # rounding is small
    left, top, wide, high = scale_jitter_windows(keys, widths, heights, (256, 480), 224).T
    sides = 224 * 45_000 / high
    counts, _ = np.histogram(sides, bins=np.linspace(255.5, 480.5, 10))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert np.mean(sides < 320) == pytest.approx(64 / 225, abs=0.006)  # the share of a uniform side
    assert np.abs(wide / high - 1).max() < 3e-3  # square, but for the resized width, which is cut to whole pixels
    for start, length, whole in ((left, wide, 60_000), (top, high, 45_000)):
        assert start.min() == 0 and (start + length).max() == whole and (start + length <= whole).all()
        places = whole * 1.0 / length * 224 - 224 + 1  # whole pixels of the resized image at which a crop may begin
        share = (np.rint(start / length * 224) + 0.5) / places
        assert np.quantile(share, [0.25, 0.5, 0.75]) == pytest.approx([0.25, 0.5, 0.75], abs=0.012)


def test_goyals_head_starts_from_a_gaussian():
    config = parse_config(["--config", "resnet152-goyal"])
    torch.manual_seed(0)
    head = build_model(replace(config.model, name="resnet50"), 1000).fc
    assert head.weight.std().item() == pytest.approx(0.01, rel=5e-3) and head.weight.mean().abs() < 1e-4
    assert not head.bias.any()
