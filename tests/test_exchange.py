"""How gradients are exchanged: by whom, in what type, in how many parts."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config import TrainConfig
from pipeline.training.step import exchange_gradients

CPU = torch.device("cpu")


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(**train) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 10))
    exchanging = exchange_gradients(network, TrainConfig(**train), CPU)
    exchanging(torch.rand(8, 64)).square().sum().backward()
    return [p.grad.clone() for p in network.parameters()]


def test_compressed_gradients_are_those_of_bf16(group):
    plain, compressed = gradients(), gradients(compress_gradients="bf16")
    for one, other in zip(plain, compressed, strict=True):
        assert not torch.equal(one, other)
        assert torch.equal(one.bfloat16().float(), other)


def test_buckets_are_as_large_as_asked(group, monkeypatch):
    made = []
    original = nn.parallel.DistributedDataParallel.__init__

    def note(self, *arguments, **options):
        made.append(options["bucket_cap_mb"])
        original(self, *arguments, **options)

    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", note)
    many = gradients(bucket_mb=0.5)
    assert made == [0.5] and all(map(torch.equal, many, gradients()))
