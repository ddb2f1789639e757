"""Averaged weights, recalibrated statistics, mirrored images: by hand, in the ledger, and over a resume."""

import numpy as np
import pytest
import runs
import torch
from torch import nn

from pipeline.config import AugmentConfig, DataConfig, EmaConfig, TrainConfig, from_dict, parse_config
from pipeline.dataset.index.scan import build_index
from pipeline.loader.build import make_train_stream
from pipeline.loader.plan import make_train_plan
from pipeline.rank_info import RankInfo
from pipeline.tracking.eval_rows import best_step
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.evaluate import Evaluation, Tally, predict
from pipeline.training.optim.ema import WeightAverage, effective_decay
from pipeline.training.ranks.watchdog import Watchdog
from pipeline.training.recalibrate import keeping_buffers, recalibrate

OPTIONS = ["--ema.decay", "0.5", "--ema.batch_size", "20", "--ema.every_steps", "2", "--schedule.warmup_epochs", "4ba"]
OPTIONS += ["--evaluation.flip", "--evaluation.recalibrate_batches", "2", "--train.eval_every_epochs", "1"]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run of 8 steps with averaged weights, evaluated after 5 and 8."""
    run = tmp_path_factory.mktemp("averages") / "whole"
    runs.call(root, run, *OPTIONS, "--checkpoint.every_steps", "1", "--checkpoint.keep", "9", "--train.max_steps", "8")
    return run


def test_the_average_reaches_back_over_the_same_images_whatever_the_batch():
    def decay(batch, every):
        ema = EmaConfig(decay=0.999, batch_size=1024, every_steps=every)
        return effective_decay(from_dict({"ema": ema, "train": TrainConfig(global_batch_size=batch)}))

    assert decay(1024, 1) == pytest.approx(0.999)
    assert decay(256, 1) ** 4 == pytest.approx(0.999) and decay(256, 4) == pytest.approx(0.999)
    assert decay(2048, 1) == pytest.approx(0.999**2)


def test_the_average_of_a_run_is_the_formulas(whole):
    """Until the warm-up is over, 4 steps, a copy; then half of the way at every second step."""

    def state(step, name):
        return torch.load(runs.checkpoint_at(whole, step) / f"{name}.pt", weights_only=True)

    for key, value in state(4, "model").items():
        assert torch.equal(state(4, "ema")[key], value) and torch.equal(state(5, "ema")[key], value)
    four, six, eight = (state(step, "model") for step in (4, 6, 8))
    for key, average in state(8, "ema").items():
        if average.is_floating_point():  # weights and BatchNorm's statistics; a step of 20 images leaves a half
            torch.testing.assert_close(average, (four[key] / 4 + six[key] * 3 / 4) / 4 + eight[key] * 3 / 4)
        else:
            assert torch.equal(average, eight[key])


def test_resuming_between_two_averagings_is_bit_identical(root, whole, tmp_path):
    cut = tmp_path / "cut"
    for last in ("5", "8"):
        runs.call(root, cut, *OPTIONS, "--checkpoint.every_steps", "1", "--train.max_steps", last)
    assert runs.repeatable(cut) == runs.repeatable(whole)
    runs.assert_same_state(runs.checkpoint_at(cut, 8), runs.checkpoint_at(whole, 8))
    assert runs.rows(cut, "eval")[-1] == runs.rows(whole, "eval")[-1]


def test_both_are_in_the_ledger_and_the_better_one_decides(whole):
    row = runs.rows(whole, "eval")[-1]
    assert {"val_top1", "val_ema_top1", "val_ema_top5", "val_ema_loss", "val_ece", "val_ema_ece"} <= row.keys()
    rows = [{"step": 1, "val_top1": 50.0, "val_ema_top1": 80.0}, {"step": 2, "val_top1": 70.0, "val_ema_top1": 60.0}]
    assert best_step(rows) == 1 and best_step(read_rows(whole / "none")) is None


def test_a_run_without_an_average_has_none(tmp_path, root):
    runs.call(root, tmp_path / "run", "--train.max_steps", "1")
    assert not (runs.checkpoint_at(tmp_path / "run", 1) / "ema.pt").exists()
    assert "val_ema_top1" not in runs.rows(tmp_path / "run", "eval")[-1]


def test_frozen_tensors_and_devices_aside_the_copy_is_a_network_of_its_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    config = from_dict({"ema": EmaConfig(decay=0.5, batch_size=256)})
    average = WeightAverage(model, config, 0)
    average.update(1)
    with torch.no_grad():
        model[0].weight += 1
    average.update(2)
    torch.testing.assert_close(average.network[0].weight, model[0].weight - 0.5)
    assert not average.network.training and not any(p.requires_grad for p in average.network.parameters())


class Batches:
    """A stream of given images."""

    def __init__(self, *images):
        self.images = images

    def batches(self, start, stop, skip, augmented):
        assert not augmented

        class Batch:
            def __init__(self, images):
                self.images = images

        return (Batch(images) for images in self.images[start:stop])


class Alone:
    size, device, watch = 1, torch.device("cpu"), Watchdog()

    def any(self, flag):
        return flag


def test_recalibrated_statistics_are_the_mean_over_the_batches(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.BatchNorm2d(3))
    one, two = torch.rand(2, 4, 3, 5, 5)
    network(one * 7)  # something to forget
    before = network[0].running_mean.clone()
    with keeping_buffers(network):
        assert recalibrate(network, Batches(one, two), range(2), frozenset(), Alone(), "fp32", False)
        mean = torch.stack([part.mean((0, 2, 3)) for part in (one, two)]).mean(0)
        variance = torch.stack([part.var((0, 2, 3)) for part in (one, two)]).mean(0)
        torch.testing.assert_close(network[0].running_mean, mean)
        torch.testing.assert_close(network[0].running_var, variance)
        assert network[2].running_mean.abs().max() < 1e-5  # nothing was dropped on the way
    assert torch.equal(network[0].running_mean, before) and network[0].momentum == 0.1
    assert not recalibrate(network, Batches(one), range(1), frozenset(), Alone(), "fp32", True)


def test_recalibration_looks_at_the_same_images_on_a_gpu(root, monkeypatch):
    """Where a stream applies the policy's ops to its images, a run's scores differed from those of `pipeline evaluate`.
    With a stand-in for the GPU's stream, and for the way of a batch to the GPU."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    index, data = build_index(root), DataConfig(image_size=32, loader="reference").resolve()
    augment = AugmentConfig(policy="randaugment", jitter=(0.2, 0.2, 0.2, 0.1))
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=12), augment)
    stream = make_train_stream(index, plan, data, RankInfo(), applies=augment)
    make_batch, network, seen = stream._batch, nn.BatchNorm2d(3), []

    def look(module, inputs):
        seen.append(inputs[0].byte())
        return (inputs[0].permute(0, 3, 1, 2).float(),)

    def on_cpu(images, encoded):
        with monkeypatch.context() as patch:
            patch.setattr(stream, "device", torch.device("cpu"))
            return make_batch(images, encoded)

    network.register_forward_pre_hook(look)
    assert recalibrate(network, stream, range(2), frozenset(), Alone(), "fp32", False)
    monkeypatch.setattr(
        "pipeline.loader.stream.prefetch_to_device", lambda batches, _, then: (then(b) for b in batches)
    )
    monkeypatch.setattr(stream, "_batch", on_cpu)
    monkeypatch.setattr(stream, "device", torch.device("cuda"))
    assert not torch.equal(next(stream.batches(0, 1)).images, seen[0])  # the step's
    assert recalibrate(network, stream, range(2), frozenset(), Alone(), "fp32", False)
    assert torch.equal(torch.cat(seen[:2]), torch.cat(seen[2:]))
    stream.close()


class Leftish(nn.Module):
    """Logits that depend on the side: the means of the left and the right half."""

    def forward(self, images):
        half = images.shape[2] // 2
        return torch.stack(
            [images[:, :, :half].float().mean((1, 2, 3)), images[:, :, half:].float().mean((1, 2, 3))], 1
        )


def test_views_of_an_image_are_averaged():
    images = torch.zeros(6, 4, 4, 3)
    images[:, :, :2] = torch.arange(6.0).view(6, 1, 1, 1)
    ids = torch.tensor([7, 7, 7, 3, 3, 3])
    plain = predict(Leftish(), images, ids, False, False)
    torch.testing.assert_close(plain[:, 0], torch.arange(6.0))
    torch.testing.assert_close(predict(Leftish(), images, ids, True, False), (plain + plain.flip(1)) / 2)
    chances = (plain.softmax(1) + plain.flip(1).softmax(1)) / 2
    crops = torch.stack([chances[:3].mean(0), chances[3:].mean(0)])
    torch.testing.assert_close(predict(Leftish(), images, ids, False, True).exp(), crops)


def test_calibration_error_by_hand():
    """Two images of confidence 0.9, one right; one of 0.6 that is right: (2 |0.9 - 0.5| + |0.6 - 1|) / 3."""
    chances = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    tally = Tally(2, torch.device("cpu"))
    tally.add(chances.log(), torch.tensor([0, 1, 1]))
    evaluation = Evaluation(tally.sums.numpy(), tally.bins.numpy(), tally.classes.numpy())
    assert evaluation.scores.val_ece == pytest.approx(100 * (2 * 0.4 + 0.4) / 3)
    assert evaluation.scores.val_top1 == pytest.approx(200 / 3)
    np.testing.assert_array_equal(evaluation.classes, [[1, 1, 1], [2, 1, 2]])


def test_the_average_is_a_copy_after_every_step_of_the_warm_up():
    network = nn.Linear(2, 1, bias=False)
    config = parse_config(["--config", str(runs.TINY), "--ema.decay", "0.9", "--ema.every_steps", "4"])
    average = WeightAverage(network, config, start=6)
    for step in range(1, 9):
        network.weight.data.fill_(step)
        average.update(step)
        expected = step if step <= 6 else average.network.weight[0, 0].item()
        assert average.network.weight[0, 0].item() == expected, step
    decay = effective_decay(config)
    assert average.network.weight[0, 0].item() == pytest.approx(6 * decay + 8 * (1 - decay))  # at 8 alone
