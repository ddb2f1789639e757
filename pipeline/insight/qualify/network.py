"""The link between this node's GPUs: bandwidth of all-reduce, what of a step it costs, how much of it is hidden.

`python -m pipeline.insight.qualify.network DEVICE FILE` is one rank, started by torchrun; rank 0 writes the file.
"""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import DataConfig, ModelConfig, RawConfig, TrainConfig
from pipeline.insight.bench.loops import wait_for
from pipeline.insight.qualify.rows import Row, Settings, judged, skipped
from pipeline.loader.stream import Batch
from pipeline.model.build import build_model
from pipeline.training.ranks.stop_request import die_with_torchrun
from pipeline.training.ranks.world import World, start_world
from pipeline.training.step import TrainStep

MIB = 1 << 20
_EFFICIENCY = 0.90  # of a step with the exchange of gradients, against one without


def network(settings: Settings) -> Iterator[Row]:
    """All GPUs of the node; on a CPU two processes by gloo."""
    on_gpu = settings.device == "cuda"
    ranks = settings.gpus if on_gpu else 2
    if ranks < 2:
        yield skipped("all-reduce", "one GPU")
        return
    file = settings.scratch / "network.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "pipeline.insight.qualify.network", settings.device, str(file)], capture_output=True, text=True
    )
    if done.returncode:
        words = next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr.strip()[-200:])
        yield Row("all-reduce", f"ended with exit code {done.returncode}: {words[:300]}", "runs", "FAIL")
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    who = f"{ranks} GPUs" if on_gpu else f"{ranks} processes on the CPU"
    for mib, gb_s in found["all_reduce"]:
        yield Row(f"all-reduce of {mib:g} MiB, {who}", f"{gb_s:,.2f} GB/s of bus", rate=gb_s)
    share = found["step_alone_s"] / found["step_s"]
    what, value = f"step with {who}", f"{share:.0%} of the speed without the exchange of gradients"
    yield judged(what, value, f"at least {_EFFICIENCY:.0%}", share >= _EFFICIENCY) if on_gpu else Row(what, value)


def bus_gb_s(size: int, seconds: float, ranks: int) -> float:
    """Bus bandwidth of an all-reduce of `size` bytes, as NCCL's tests count it: 2 (n - 1) / n of the bytes cross each
    link."""
    return size * 2 * (ranks - 1) / ranks / seconds / 1e9


def measure(world: World) -> dict:
    """What one rank finds; all ranks together. Collective."""
    on_gpu = world.device.type == "cuda"
    found: dict = {"all_reduce": []}
    for mib in (1, 16, 256, 1024) if on_gpu else (1, 16):
        data = torch.ones(mib * MIB // 4, device=world.device)
        seconds = _seconds(world, functools.partial(dist.all_reduce, data), 10 if on_gpu else 3)
        found["all_reduce"].append([mib, bus_gb_s(data.nbytes, seconds, world.size)])
    batch, size, model = (128, 224, "resnet152") if on_gpu else (4, 32, "resnet18")
    train = TrainConfig(global_batch_size=batch * world.size, precision="bf16" if on_gpu else "fp32")
    config = RawConfig(data=DataConfig(image_size=size), model=ModelConfig(name=model), train=train).resolve()
    step = TrainStep(build_model(config.model, 1000), config, world)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=world.device)
    targets = torch.randint(0, 1000, (batch,), device=world.device)
    resident = Batch(images, targets, torch.arange(batch, device=world.device))
    exchanging = step.exchanging

    def alone() -> None:
        with exchanging.no_sync():  # type: ignore[operator]  # there are several ranks
            step(resident, 0.0)

    found["step_s"] = _seconds(world, lambda: step(resident, 0.0), 10 if on_gpu else 2)
    found["step_alone_s"] = _seconds(world, alone, 10 if on_gpu else 2)
    return found


def _seconds(world: World, action: Callable[[], object], repeats: int) -> float:
    """The best of `repeats`, after one that does not count; all ranks begin together."""
    times = []
    for _ in range(repeats + 1):
        wait_for(world.device)
        world.any(False)
        begun = time.perf_counter()
        action()
        wait_for(world.device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


if __name__ == "__main__":
    die_with_torchrun()  # which is killed where the part takes too long; a rank that hangs would keep its GPU
    world = start_world(TrainConfig(device="cuda" if sys.argv[1] == "cuda" else "cpu"))
    result = measure(world)
    if world.is_rank_zero:
        Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    world.close()
    sys.stdout.flush()
    os._exit(0)
