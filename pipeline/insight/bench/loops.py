"""The training loops that `bench step` compares: this project's, and a bare one as in a tutorial."""

import tempfile
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.config import CheckpointConfig, Config, DataConfig, ModelConfig, RawConfig, TrackingConfig, TrainConfig
from pipeline.insight.bench.precision import Precision
from pipeline.loader.plan import TrainPlan
from pipeline.loader.stream import Batch, Stream
from pipeline.training.ranks.world import World

if TYPE_CHECKING:
    from pipeline.training.loop import Trainer


class ResidentStream(Stream):
    """A loader without cost: ids and labels of this rank's training stream, and in every batch the same images, which
    are on the device."""

    def __init__(self, stream: Stream, world: World, size: int):
        assert isinstance(stream.plan, TrainPlan)
        self.plan: TrainPlan = stream.plan
        self.source, self.rank, self.world_size = stream.source, world.rank, world.size
        self.labels, self.device = stream.labels, world.device
        count = self.plan.global_batch_size // world.size
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
        self.images, self._stream = images.to(self.device), stream

    def batches(
        self, start: int, stop: int, skip: frozenset[int] = frozenset(), augmented: bool = True
    ) -> Generator[Batch, None, None]:
        count = len(self.images)
        for step in range(start, stop):
            ids, *_ = self.plan.samples_at(step, self.rank * count, (self.rank + 1) * count)
            targets = torch.from_numpy(np.ascontiguousarray(self.labels[ids]))
            yield Batch(self.images, targets.to(self.device), torch.from_numpy(ids).to(self.device))

    def close(self) -> None:
        self._stream.close()


def make_data(folder: Path, images: int, size: int = 32) -> Path:
    """A small tree of synthetic images, for benches that need no real ones."""
    from pipeline.dataset.synthetic.generate import Settings, generate_tree

    generate_tree(folder, Settings(classes=2, train_per_class=-(-images // 2), val_per_class=2, size=size, oddities=0))
    return folder


def bench_config(folder: Path, model: str, size: int, batch: int, precision: Precision, **train: Any) -> Config:
    """A run in `folder` that saves and evaluates only when asked to."""
    root = make_data(folder / "data", batch)
    return RawConfig(
        run_dir=str(folder / "run"),
        data=DataConfig(root=str(root), image_size=size, loader="reference"),
        model=ModelConfig(name=model, num_classes=1000),
        train=TrainConfig(global_batch_size=batch, precision=precision, **train),
        checkpoint=CheckpointConfig(every_minutes=None, every_epoch=False),
        tracking=TrackingConfig(wandb="disabled", report=False, print_every_s=1e9),
    ).resolve()


def open_trainer(config: Config, world: World) -> "Trainer":
    """A trainer of the run in `config.run_dir`, warmed up."""
    from pipeline.training import loop
    from pipeline.training.ranks.stop_request import StopRequest
    from pipeline.training.setup import prepare_run

    trainer = loop.open_trainer(prepare_run(config, world, StopRequest(install=False)))
    trainer.warm_up()
    return trainer


def pipeline(
    model: str, size: int, batch: int, precision: Precision, steps: int, threads: int | None, options: dict
) -> Callable[[], int]:
    """The whole training loop: step, statistics, guard, ledger; only the loader is replaced, by a `ResidentStream`."""
    from pipeline.training.ranks.world import start_world

    config = bench_config(Path(tempfile.mkdtemp(prefix="bench-step-")), model, size, batch, precision, **options)
    world = start_world(config.train)
    if threads:
        torch.set_num_threads(threads)
    trainer = open_trainer(config, world)
    trainer.train_stream = ResidentStream(trainer.train_stream, world, size)

    def one_round() -> int:
        trainer.train_until(trainer.step + steps)
        wait_for(world.device)
        return steps

    return one_round


def bare(
    model: str, size: int, batch: int, precision: Precision, steps: int, threads: int | None, options: dict
) -> Callable[[], int]:
    """Forward, backward, update, and nothing else: no statistics, no gradient norm, no guard, one rank."""
    from torch import nn

    from pipeline.config import OptimConfig
    from pipeline.model.build import Normalized, build_model
    from pipeline.training.step import autocast

    if threads:
        torch.set_num_threads(threads)
    train = TrainConfig(precision=precision, **options)
    device = compute_device(train.device)
    torch.backends.cudnn.benchmark = True
    data, optim = DataConfig().resolve(), OptimConfig()
    network = build_model(replace(ModelConfig(), name=model), 1000)
    network = Normalized(network, data.mean, data.std, train.channels_last).to(device).train()
    forward = torch.compile(network) if train.compile else network
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    loss_of = nn.CrossEntropyLoss()
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8).to(device)
    targets = torch.randint(0, 1000, (batch,)).to(device)

    def one_round() -> int:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, precision):
                loss = loss_of(forward(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        wait_for(device)
        return steps

    return one_round


def compute_device(name: str) -> torch.device:
    """Where a bench computes that was asked for "auto", "cuda" or "cpu"."""
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
