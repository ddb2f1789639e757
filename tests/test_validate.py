"""`train` and `preflight` judge the same configurations by the same rules, in the same words."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from pipeline.config import load_config, parse_config, semantic_config
from pipeline.dataset.index.index import open_index
from pipeline.dataset.index.scan import build_index
from pipeline.errors import UserError
from pipeline.insight.preflight.checks import check_recipe, device_type
from pipeline.loader.build import check_shares
from pipeline.training import setup
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.world import World
from pipeline.training.validate import validate

TINY = Path(__file__).parent / "tiny.yaml"
MIXED = ("--augment.mixup", "0.2")

#: (ranks, options, what the line says; "" where the run can be trained)
CASES = [
    *[(n, ("--train.global_batch_size", "12"), "") for n in (1, 2, 3, 4, 6)],
    *[(n, ("--train.global_batch_size", "12"), "is not divisible by") for n in (5, 7, 8, 9, 24)],
    (2, ("--train.global_batch_size", "6", *MIXED), "--augment.mix_group 2 does not divide the 3 images"),
    (1, ("--train.global_batch_size", "6", *MIXED), ""),
    (3, ("--train.global_batch_size", "6", *MIXED), ""),
    (6, ("--train.global_batch_size", "6", "--augment.cutmix", "1"), "--augment.mix_group 2"),
    (2, ("--train.global_batch_size", "8", *MIXED, "--augment.mix_group", "4"), ""),
    (4, ("--train.global_batch_size", "8", *MIXED, "--augment.mix_group", "4"), "--augment.mix_group 4"),
    (4, ("--train.global_batch_size", "8", "--augment.mix_group", "4"), ""),
    (1, ("--model.sync_batchnorm", "true"), "--model.sync_batchnorm requires GPUs"),
    (2, ("--model.sync_batchnorm", "true"), "--model.sync_batchnorm requires GPUs"),
    (1, ("--model.sync_batchnorm", "false"), ""),
    (1, ("--model.name", "densenet121", "--train.micro_batch_size", "1"), "--train.micro_batch_size 1"),
    (1, ("--model.name", "densenet121", "--train.micro_batch_size", "2"), ""),
    (1, ("--model.name", "densenet121", "--train.micro_batch_size", "5"), "--train.micro_batch_size 5"),
    (16, ("--model.name", "densenet121"), "--train.global_batch_size 16"),
    (1, ("--model.name", "densenet121", "--train.micro_batch_size", "1", "--data.image_size", "64"), ""),
    (1, ("--model.name", "vgg11", "--train.micro_batch_size", "1"), ""),
    (1, ("--model.name", "alexnet"), "--data.image_size 32"),
    (1, ("--model.name", "alexnet", "--data.image_size", "64"), "--data.val_size 32"),
    (1, ("--model.name", "alexnet", "--data.image_size", "64", "--data.val_size", "64", "--data.val_resize", "64"), ""),
    (1, ("--model.name", "vit_b_16"), "--data.image_size 32"),
    (1, ("--model.name", "inception_v3"), "--data.image_size 32"),
    (1, ("--model.name", "resnet1152"), "is not a torchvision classification model"),
    (1, ("--model.name", "resnet50"), ""),
    (1, ("--model.num_classes", "3"), "--model.num_classes 3: the data set has 4 classes"),
    (1, ("--model.num_classes", "4"), ""),
    (2, ("--model.num_classes", "10"), ""),
    (1, ("--model.name", "vgg11", "--model.zero_init_residual", "true"), "--model.zero_init_residual"),
    (1, ("--model.zero_init_residual", "true"), ""),
    (1, ("--model.freeze", "layer9.*"), "--model.freeze layer9.*"),
    (1, ("--model.freeze", "layer1.*"), ""),
    (1, ("--model.freeze", "*"), "leaves nothing to train"),
    (1, ("--model.freeze", "body"), ""),
    (1, ("--model.name", "vgg11", "--model.stochastic_depth", "0.1"), "--model.stochastic_depth 0.1"),
    (1, ("--model.stochastic_depth", "0.1"), ""),
    (1, ("--model.name", "vgg11", "--model.blurpool", "convs"), "--model.blurpool"),
    (1, ("--model.blurpool", "convs"), ""),
    (1, ("--model.aux_weight", "0.3"), "--model.aux_weight 0.3"),
    (1, ("--data.start_size", "16", "--data.ramp_epochs", "[0,1]"), ""),
    (
        1,
        ("--model.name", "densenet121", "--data.start_size", "8", "--data.ramp_epochs", "[0,1]"),
        "--data.start_size 8",
    ),
    (5, ("--model.name", "resnet1152"), "is not divisible by"),
    (2, ("--model.sync_batchnorm", "true", "--model.num_classes", "3"), "--model.sync_batchnorm"),
]


class Accepted(Exception):
    """`train` has come to the weights: it trains this configuration."""


@pytest.fixture(scope="module")
def root(synthetic_root: Path) -> Path:
    build_index(synthetic_root)
    return synthetic_root


def options_of(root: Path, run_dir: Path, options: tuple[str, ...]) -> list[str]:
    base = [
        "--data.root",
        str(root),
        "--run_dir",
        str(run_dir),
        "--train.device",
        "cpu",
        "--tracking.wandb",
        "disabled",
    ]
    base += ["--data.loader", "reference", "--model.name", "resnet18", "--model.zero_init_residual", "false"]
    return [*base, "--train.global_batch_size", "16", *options]


@pytest.fixture
def train(monkeypatch):
    """The verdict of `train` as rank 0 of so many: its line, or "" if it comes to the checkpoint to start from."""

    def reach(*_) -> None:
        raise Accepted

    def call(config, ranks: int) -> str:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        try:
            setup.prepare_run(config, World(0, ranks, 0, ranks, torch.device("cpu")), StopRequest())
        except Accepted:
            return ""
        except ValueError as error:
            return str(error)
        finally:
            dist.destroy_process_group()
        raise AssertionError("neither refused nor begun")

    monkeypatch.setattr(setup, "find_start", reach)
    monkeypatch.setattr(setup, "refuse_differences", lambda facts, world: None)  # the other ranks are not there
    return call


@pytest.mark.parametrize(("recipe", "ranks"), [("resnet152", 80), ("resnet50-ffcv-16", 24), ("smoke", 3)])
def test_both_remedies_for_a_batch_that_can_not_be_shared_are_accepted(recipe, ranks):
    """Ten nodes of 8 GPUs, say; with mixup the pairs that are mixed count as well."""
    config = parse_config(["--config", recipe])
    with pytest.raises(UserError, match=r"give a multiple, e\.g\. (\d+), or fewer ranks, e\.g\. (\d+)$") as refused:
        check_shares(config, ranks)
    batch, fewer = re.findall(r"e\.g\. (\d+)", str(refused.value))
    check_shares(parse_config(["--config", recipe, "--train.global_batch_size", batch]), ranks)
    check_shares(config, int(fewer))


@pytest.mark.parametrize(("ranks", "options", "words"), CASES)
def test_the_same_verdict_in_the_same_words(root, tmp_path, train, ranks, options, words):
    config = load_config(TINY, options_of(root, tmp_path / "run", options))
    classes = open_index(root / "index").num_classes
    result = check_recipe(config, ranks, device_type(config, gpus=0), classes)
    line = train(config, ranks)
    assert line == (result.text if result.level == "FAIL" else "")
    assert words in line and bool(words) == bool(line)


def test_there_are_fifty():
    assert len(CASES) >= 50 and len({(ranks, options) for ranks, options, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(("ranks", "options", "words"), [CASES[10], CASES[18], CASES[20], CASES[33]])
def test_the_two_commands_say_the_same(root, tmp_path, ranks, options, words):
    argv = ["--config", str(TINY), *options_of(root, tmp_path / "run", options)]
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def said(*command: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    code, train = said(*launch, "-m", "pipeline", "train", *argv)
    assert code == (1 if launch else 2)  # torchrun's own for any failure
    line = next(text for text in train.splitlines() if text.startswith("pipeline train: "))
    code, preflight = said("-m", "pipeline", "preflight", *argv, "--world_size", str(ranks))
    row = next(text for text in preflight.splitlines() if text.startswith("FAIL  recipe"))
    assert code == 2 and words in line
    assert line.removeprefix("pipeline train: ") == row.removeprefix("FAIL  recipe").strip()


def test_decoding_on_a_gpu_is_refused_on_a_cpu_and_without_dali():
    mixed = parse_config(["--data.decode", "mixed", "--model.name", "resnet18"])
    with pytest.raises(UserError, match=r"--data.decode mixed decodes on a GPU, .* give --data.decode cpu"):
        validate(mixed, 1, "cpu")
    validate(mixed, 1, "cuda")
    with pytest.raises(UserError, match=r"--data.decode mixed is DALI's"):
        validate(parse_config(["--data.decode", "mixed", "--data.loader", "reference"]), 1, "cuda")
    assert semantic_config(mixed)["data.decode"] == "mixed"  # of the run's identity
