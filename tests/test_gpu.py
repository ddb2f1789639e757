"""The same claims on a CUDA device. Skipped where there is none, so nothing here has to pass for a release by CPU."""

import numpy as np
import pytest
import runs
import torch

from pipeline.config import DataConfig, TrainConfig
from pipeline.dataset.scan import build_index
from pipeline.loader import build
from pipeline.training.distributed import World

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def root(synthetic_root):
    build_index(synthetic_root)
    return synthetic_root


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_resumed_is_bit_identical_with_deterministic_kernels(root, tmp_path, precision):
    options = ["--train.precision", precision, "--train.deterministic", "--checkpoint.every_steps", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.train(root, whole, *options)
    runs.kill_once_saved(6, root, cut, *options)
    runs.train(root, cut, *options)
    assert runs.repeatable(cut) == runs.repeatable(whole)
    step = runs.rows(whole, "train")[-1]["step"]
    runs.assert_same_state(runs.checkpoint_at(cut, step), runs.checkpoint_at(whole, step))


def test_resizing_on_the_gpu_gives_the_cpus_pixels(root):
    if build.dali_problem():
        pytest.skip("no DALI")
    index = build_index(root)
    config = DataConfig(loader="dali", image_size=64, val_size=64, val_resize=72)
    plan = build.make_train_plan(index, config, TrainConfig(global_batch_size=16))
    images = {}
    for name in ("cpu", "cuda"):
        place = World(0, 1, 0, 1, torch.device(name, 0) if name == "cuda" else torch.device(name))
        stream = build.make_train_stream(index, plan, config, place)
        images[name] = torch.cat([batch.images.cpu() for batch in stream.batches(0, 4)]).numpy().astype(int)
        stream.close()
    difference = np.abs(images["cpu"] - images["cuda"])
    assert difference.mean() <= 0.3 and difference.max() <= 16  # DALI's resize against torch's: as DALI on a CPU was


def test_compiled_and_accumulated_steps_learn(root, tmp_path):
    run = tmp_path / "run"
    runs.train(root, run, "--train.compile", "--train.micro_batch_size", "5")
    losses = [row["loss"] for row in runs.rows(run, "train")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
