"""`bench checkpoint`: how long a save blocks the training, and what it takes in the background."""

import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pipeline.insight.bench.interleaved import Spread, format_rows
from pipeline.limits import available_cores


def checkpoint(
    model: str = "resnet152",
    folder: str | None = None,
    rounds: int = 7,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> dict:
    """How long a step waits for a checkpoint, and how long the background work takes: writing, hashing, reading back.

    Args:
        model: a torchvision classification model, with SGD and momentum.
        folder: where to write; default: a temporary folder, which may be another disk than your runs'.
        rounds: rounds that count, after one that does not.
        device: where the model lives.
    """
    import torch

    from pipeline.config import ModelConfig, OptimConfig
    from pipeline.model.build import build_model
    from pipeline.training.optim.optimizer import make_optimizer
    from pipeline.training.run_folder.checkpoint import load_state, verify_checkpoint, write_checkpoint
    from pipeline.training.run_folder.snapshot import HostCopy

    cuda = device != "cpu" and torch.cuda.is_available()
    place = torch.device("cuda" if cuda else "cpu")
    network = build_model(ModelConfig(name=model), 1000).to(place).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(network, OptimConfig())

    def state() -> dict[str, Any]:
        return {"model": network.state_dict(), "optimizer": {"optimizer": optimizer.state_dict()}}

    host = HostCopy(place, print)
    begun = time.perf_counter()
    host.reserve(state())
    reserve_s = time.perf_counter() - begun
    parent = Path(folder).expanduser() if folder else None
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=parent))
    seen: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], Any], counts: bool) -> Any:
        if cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        result = action()
        if counts:
            seen.setdefault(f"{name}_ms", []).append(1e3 * (time.perf_counter() - wall))
            seen.setdefault(f"{name}_cpu_ms", []).append(1e3 * (time.process_time() - cpu))
        return result

    def plain_copy() -> Any:
        return _copied(state())

    try:
        for number in range(rounds + 1):
            counts = number > 0
            copy, wait = timed("stall", lambda: host.take(state()), counts)
            timed("transfer", wait, counts)
            timed("plain_copy", plain_copy, counts)
            path = timed("write", functools.partial(write_checkpoint, scratch, number, copy, {}), counts)
            timed("verify", functools.partial(verify_checkpoint, path), counts)
            timed("load", functools.partial(load_state, path), counts)
            shutil.rmtree(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    spreads = {name: Spread.of(values) for name, values in seen.items()}
    gigabytes = host.bytes / 1e9

    def line(name: str) -> str:
        s = spreads[f"{name}_ms"]
        cpu = spreads[f"{name}_cpu_ms"].median
        return f"{s.median:9.1f}   {s.minimum:9.1f} {s.maximum:9.1f}    {cpu:9.1f}    {gigabytes / s.median * 1e3:7.2f}"

    head = f"{'ms: median':>9}   {'minimum':>9} {'maximum':>9}    {'CPU ms':>9}    {'GB/s':>7}"
    print(f"{model} on {place.type}, SGD with momentum: {host.bytes:,} bytes; {available_cores()} cores")
    print(
        format_rows(
            {
                "": head,
                "training blocked": line("stall"),
                "copy to the host": line("transfer"),
                "write, hash, fsync": line("write"),
                "verify": line("verify"),
                "load": line("load"),
                "tensor.to('cpu', copy)": line("plain_copy"),
            }
        )
    )
    print(f"  host memory is allocated once, in {reserve_s:.2f} s; a save waits until the previous one is written")
    values = {name: spread.as_dict(2) for name, spread in spreads.items()}
    return {"model": model, "device": place.type, "bytes": host.bytes, "reserve_s": round(reserve_s, 3), **values}


def _copied(value: Any) -> Any:
    """A deep copy with new memory for every tensor: what a save costs without `HostCopy`."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value
