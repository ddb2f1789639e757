"""ResNet-152 at 224 px on real ImageNet JPEGs, two ranks, DALI. Skips where there are no sample images."""

import os
import shutil
from pathlib import Path

import pytest
import runs

SAMPLES = Path(os.environ.get("IMAGENET_SAMPLE", Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample"))


@pytest.mark.slow
@pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"no real images at {SAMPLES}; set IMAGENET_SAMPLE")
def test_resnet152_trains_on_real_imagenet_images(tmp_path):
    for number, image in enumerate(sorted(SAMPLES.glob("*.JPEG"))[:60]):
        for split in ("train",) if number % 10 else ("train", "val"):
            folder = tmp_path / "data" / split / image.name.split("_")[0]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder)
    run = tmp_path / "run"
    options = ["--train.global_batch_size", "8", "--train.max_steps", "3", "--tracking.wandb", "disabled"]
    options += ["--train.precision", "fp32"]  # CPUs without instructions for bf16 take six times as long with it
    output = runs.train(tmp_path / "data", run, *options, "--data.loader", "dali", processes=2, recipe="resnet152")
    assert "60 training images of 60 classes by dali" in output
    losses = [row["loss"] for row in runs.rows(run, "train")]
    assert len(losses) == 3 and all(3 < loss < 6 for loss in losses)  # ln 60 = 4.1
    assert runs.rows(run, "eval")[-1]["images"] == 6
