"""`bench checkpoint`: how long a save blocks the training, and what it takes in the background."""

import functools
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    """How long a step waits for a checkpoint, how long the background work takes (writing, hashing, reading back), and
    how much slower training is meanwhile: with one thread for its arithmetic, so that a second core is free to write.

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
    from pipeline.training.run_folder.checkpoint import load_state, write_checkpoint
    from pipeline.training.run_folder.manifest import verify_checkpoint
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
            write = functools.partial(write_checkpoint, scratch, number, copy, {})
            for name, seconds in steps_while(write, place).items():
                if counts:
                    seen.setdefault(name, []).append(1e3 * seconds)
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
    ratios = {
        name: Spread.of(
            [busy / free for busy, free in zip(seen[f"step_while_{name}_ms"], seen["step_ms"], strict=True)]
        )
        for name in ("thread", "process")
        if f"step_while_{name}_ms" in seen
    }
    for name, ratio in ratios.items():
        print(
            f"  a step takes {ratio.median:.3f} x its time while a {name} writes a checkpoint "
            f"({ratio.minimum:.3f} to {ratio.maximum:.3f}; {spreads['step_ms'].median:.1f} ms without)"
        )
    values = {name: spread.as_dict(2) for name, spread in spreads.items()}
    return {"model": model, "device": place.type, "bytes": host.bytes, "reserve_s": round(reserve_s, 3), **values} | {
        f"step while a {name} writes / step": ratio.as_dict() for name, ratio in ratios.items()
    }


def steps_while(write: Callable[[], Any], place: Any) -> dict[str, float]:
    """Seconds of a small network's training step: step_ms with nothing beside it, step_while_thread_ms
    while a thread of this process calls `write`, as a run does; on a CPU also step_while_process_ms, a process that has
    an interpreter's lock of its own. The step's many small operators are the hard case: each has to get the lock back.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    network = _small_network(place)
    images = torch.randn(4, 3, 32, 32, device=place)

    def seconds(enough: Callable[[int], bool]) -> float:
        begun, done = time.perf_counter(), 0
        while done == 0 or not enough(done):
            network.zero_grad()
            network(images).sum().backward()
            if place.type == "cuda":
                torch.cuda.synchronize()
            done += 1
        return (time.perf_counter() - begun) / done

    found = {}
    try:
        seconds(lambda done: done >= 3)
        before = seconds(lambda done: done >= 10)
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            found["step_while_thread_ms"] = seconds(lambda _: writing.done())
            writing.result()
        if place.type == "cpu":  # a fork has what is to be written
            child = multiprocessing.get_context("fork").Process(target=write)
            child.start()
            found["step_while_process_ms"] = seconds(lambda _: not child.is_alive())
            child.join()
        found["step_ms"] = (before + seconds(lambda done: done >= 10)) / 2
    finally:
        torch.set_num_threads(threads)
    return found


def _small_network(place: Any) -> Any:
    from pipeline.config import ModelConfig
    from pipeline.model.build import build_model

    return build_model(ModelConfig(name="resnet18"), 10).to(place).train()


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
