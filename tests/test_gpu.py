"""The same claims on a CUDA device. Skipped where there is none, so nothing here has to pass for a release by CPU."""

import subprocess
import sys

import numpy as np
import pytest
import runs
import torch
from torch import nn

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.dataset.index.scan import build_index
from pipeline.loader import build
from pipeline.loader.plan import make_train_plan
from pipeline.training.ranks.world import World
from pipeline.training.run_folder.snapshot import HostCopy
from pipeline.training.step import NormalizeEraseMix

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


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
    config = DataConfig(loader="dali", image_size=64, val_size=64, val_resize=72).resolve()
    plan = make_train_plan(index, config, TrainConfig(global_batch_size=16))
    images = {}
    for name in ("cpu", "cuda"):
        place = World(0, 1, 0, 1, torch.device(name, 0) if name == "cuda" else torch.device(name))
        stream = build.make_train_stream(index, plan, config, place)
        images[name] = torch.cat([batch.images.cpu() for batch in stream.batches(0, 4)]).numpy().astype(int)
        stream.close()
    difference = np.abs(images["cpu"] - images["cuda"])
    assert difference.mean() <= 0.3 and difference.max() <= 16  # DALI's resize against torch's: as DALI on a CPU was


def test_augmentation_on_the_gpu_gives_the_cpus_pixels(root):
    """Bytes within a level where a sum is rounded the other way; erased and mixed as floats."""
    index = build_index(root)
    config = DataConfig(loader="reference", image_size=64, val_size=64, val_resize=72).resolve()
    c = AugmentConfig(
        policy="randaugment-timm", num_ops=4, jitter=(0.3, 0.3, 0.3, 0.1), random_erase=0.5, mixup=0.2, cutmix=1.0
    )
    plan = make_train_plan(index, config, TrainConfig(global_batch_size=64), c)
    changed, seen = {}, {}
    for name in ("cpu", "cuda"):
        device = torch.device(name, 0) if name == "cuda" else torch.device(name)
        stream = build.make_train_stream(index, plan, config, World(0, 1, 0, 1, device), applies=c)
        (batch,) = stream.batches(0, 1)
        stream.close()
        whole = NormalizeEraseMix(nn.Identity(), config.mean, config.std, True, c.mix_group).to(device)
        changed[name] = batch.augmented(c).cpu().int()
        seen[name] = whole(changed["cpu"].to(device, torch.uint8), batch.erase_mix).cpu()
    assert (changed["cpu"] != changed["cuda"]).float().mean() <= 1e-3
    torch.testing.assert_close(seen["cpu"], seen["cuda"])


def test_compiled_and_accumulated_steps_learn(root, tmp_path):
    run = tmp_path / "run"
    runs.train(root, run, "--train.compile", "--train.micro_batch_size", "5")
    losses = [row["loss"] for row in runs.rows(run, "train")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_a_snapshot_holds_the_state_of_its_step_though_the_next_one_goes_on():
    device = torch.device("cuda", 0)
    live = {"model": {"w": torch.ones(50_000_000, device=device), "step": torch.tensor(3.0)}}
    for room in (True, False):
        host = HostCopy(device, print)
        host.has_room = room
        copy, wait = host.take(live)
        live["model"]["w"].add_(1)  # the next update, sent before the copy has arrived
        wait()
        assert copy["model"]["w"].is_pinned()
        assert torch.equal(copy["model"]["w"] + 1, live["model"]["w"].cpu())


@pytest.mark.parametrize("loader", ["reference", "dali"])
def test_batches_arrive_ahead_and_whole(root, loader):
    if loader == "dali" and build.dali_problem():
        pytest.skip("no DALI")
    index = build_index(root)
    config = DataConfig(loader=loader, image_size=64, val_size=64, val_resize=72).resolve()
    plan = make_train_plan(index, config, TrainConfig(global_batch_size=16))
    stream = build.make_train_stream(index, plan, config, World(0, 1, 0, 1, torch.device("cuda", 0)))
    once, again = (torch.cat([batch.images for batch in stream.batches(0, 5)]).cpu() for _ in range(2))
    assert torch.equal(once, again) and once.float().std() > 10
    unfinished = stream.batches(0, 5)
    batch = next(unfinished)
    unfinished.close()
    assert batch.images.is_cuda and batch.targets.is_cuda and torch.equal(batch.images.cpu(), once[:16])
    stream.close()


def test_recorded_steps_learn(root, tmp_path):
    run = tmp_path / "run"
    runs.train(root, run, "--train.compile", "--train.cuda_graphs", "--train.profile_steps", "2")
    losses = [row["loss"] for row in runs.rows(run, "train")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert {path.suffix for path in (run / "profile").iterdir()} == {".gz", ".pickle"}


FAULT = """
import time
import torch
import torch.distributed as dist
from pipeline.config import TrainConfig
from pipeline.training.ranks.world import start_world
world = start_world(TrainConfig(device="cuda"))
data = torch.ones(1 << 20, device=world.device)
dist.all_reduce(data)
torch.cuda.synchronize()
data[torch.tensor([1 << 30], device=world.device)] += 1  # beyond its end: the device stops with an assertion
dist.all_reduce(data)
time.sleep(3)  # as long as this thread does not look: torch's own thread looks ten times a second
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print("met:", str(error).splitlines()[0], flush=True)
import os
os._exit(0)
"""


def test_a_fault_is_met_by_the_training_thread():
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "met: CUDA error" in done.stdout, done.stderr[-3000:]
