"""`bench train`: the bottleneck of a run, with its own options and on its own machine; also under torchrun.

The same steps are timed with more and more of the run around them: the step alone, with the gradient exchange, with
loader, statistics and ledger; and the loader and a save by themselves. The differences show the bottleneck.
"""

import contextlib
import dataclasses
import functools
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.command import split_options
from pipeline.config import CheckpointConfig, Config, TrackingConfig, parse_config
from pipeline.errors import UserError
from pipeline.insight.bench.interleaved import Spread, format_rows

if TYPE_CHECKING:
    from pipeline.training.ranks.world import World

NEGLIGIBLE = 0.03  # share of a step's time
REMEDIES = {
    "data": "more cores or --data.threads, shards with a reduced short side (pipeline pack --short_side 256), a local "
    "disk (pipeline stage); bench loader and bench io show which",
    "communication": "a larger local batch, --train.compress_gradients bf16, --train.bucket_mb, or a faster link; "
    "--train.profile_steps 10 and bench overlap show what overlaps",
    "checkpointing": "a larger --checkpoint.every_minutes, or a faster disk; bench checkpoint measures a save",
    "records": "look at --train.profile_steps 10",
}


@dataclass(frozen=True)
class Options:
    """Measure what limits a run's speed: data, compute, communication or checkpointing. Takes the options of `pipeline
    train`, alone or under torchrun; nothing but the result is kept. --json FILE writes it to that file."""

    steps: int = 10
    """Steps in a round."""
    rounds: int = 5
    """Rounds that count, after one that does not."""


def main(argv: list[str]) -> dict | None:
    """The result; None on all ranks except the first."""
    options, rest = split_options(Options, "bench train", argv)
    if options.steps < 1 or options.rounds < 1:
        raise UserError("--steps and --rounds must be 1 or more")
    config = parse_config(rest, "bench train", Options)
    from pipeline.training.ranks.world import start_world

    world = start_world(config.train)
    folder = world.on_rank_zero(lambda: tempfile.mkdtemp(prefix="bench-train-"))
    try:
        return measure(quiet(config, folder), world, options.steps, options.rounds, config.checkpoint.every_minutes)
    finally:
        if world.is_rank_zero:
            shutil.rmtree(folder, ignore_errors=True)
        world.close()


def quiet(config: Config, folder: str) -> Config:
    """The same run in another folder; it saves and prints only when asked to."""
    return dataclasses.replace(
        config,
        run_dir=str(Path(folder) / "run"),
        resume="auto",
        checkpoint=CheckpointConfig(every_minutes=None, every_epoch=False, keep=1),
        tracking=TrackingConfig(wandb="disabled", report=False, print_every_s=1e9),
    )


def measure(config: Config, world: "World", steps: int, rounds: int, save_every_minutes: float | None) -> dict | None:
    """Time the parts in turn, and print and return the bottleneck. Collective; None on ranks other than 0."""
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.insight.bench.loops import ResidentStream, open_trainer, wait_for
    from pipeline.tracking.ledger_rows import read_rows

    world.on_rank_zero(lambda: Path(config.run_dir).mkdir(parents=True, exist_ok=True))
    trainer = open_trainer(config, world)
    trainer.batches.last_step = 0  # the loader alone is timed, too: it must not read ahead meanwhile
    stream, step = trainer.train_stream, trainer.train_step
    (batch,) = ResidentStream(stream, world, config.data.image_size).batches(0, 1)
    exchanging = step.exchanging if isinstance(step.exchanging, DistributedDataParallel) else None
    seen: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], None], counts: bool, units: int = steps) -> None:
        wait_for(world.device)
        world.any(False)  # all ranks start together
        begun = time.perf_counter()
        action()
        wait_for(world.device)
        if counts:
            seen.setdefault(name, []).append((time.perf_counter() - begun) / units)

    def compute() -> None:
        for _ in range(steps):
            with exchanging.no_sync() if exchanging is not None else contextlib.nullcontext():
                step(batch, 0.0)

    def compute_and_exchange() -> None:
        for _ in range(steps):
            step(batch, 0.0)

    def load(first: int) -> None:
        for _ in stream.batches(first, first + steps):
            pass

    for number in range(rounds + 1):
        counts = number > 0
        timed("loader", functools.partial(load, number * steps), counts)
        timed("compute", compute, counts)
        if exchanging is not None:
            step.optimizer.state.clear()  # each rank's momentum is of its own gradients now
            timed("compute, exchange", compute_and_exchange, counts)
        timed("run", lambda: trainer.train_until(trainer.step + steps), counts)
        timed("save", trainer.save, counts, units=1)
        if trainer.recorder:
            begun = time.perf_counter()
            trainer.recorder.writer.wait()
            seen.setdefault("background write", []).append(time.perf_counter() - begun)
    waits = [row["data_wait_fraction"] for row in read_rows(trainer.setup.folder.ledger) if row.get("kind") == "train"][
        steps:
    ]
    trainer.close()
    if not world.is_rank_zero:
        return None
    spreads = {name: Spread.of(values) for name, values in seen.items()}
    return find_bottleneck(config, world, spreads, Spread.of(waits).median, save_every_minutes)


def find_bottleneck(
    config: Config,
    world: "World",
    spreads: dict[str, Spread],
    data_wait_fraction: float,
    save_every_minutes: float | None,
) -> dict:
    """Print and return the parts of a step, their shares of it, and the verdict.

    Args:
        spreads: seconds of each part, by name.
        data_wait_fraction: of a step's time, the share that waits for the loader.
        save_every_minutes: interval of the run's checkpoints; None: they are not counted.
    """
    images = config.train.global_batch_size
    run = spreads["run"].median
    compute = spreads["compute"].median
    step = spreads.get("compute, exchange", spreads["compute"]).median
    save = spreads["save"].median / (60 * save_every_minutes) if save_every_minutes else 0.0
    shares = {
        "compute": min(1.0, compute / run),
        "communication": max(0.0, step - compute) / run,
        "data": data_wait_fraction,
        "records": max(0.0, run - step - data_wait_fraction * run) / run,
        "checkpointing": save,
    }
    loader_rate, step_rate = images / spreads["loader"].median, images / step
    print(
        f"{config.model.name}, {config.train.precision}, {images} images a step on {world.size} x {world.device.type}"
    )
    lines = {
        name: f"{1e3 * s.median:10.1f}   {1e3 * s.minimum:10.1f} {1e3 * s.maximum:10.1f}" for name, s in spreads.items()
    }
    print(format_rows({"ms a step": f"{'median':>10}   {'minimum':>10} {'maximum':>10}", **lines}))
    print(
        f"  {images / run:,.1f} images/s; the loader alone gives {loader_rate:,.1f}, "
        f"{loader_rate / step_rate:.2f} times what the step consumes\n"
    )
    print(format_rows({name: f"{100 * share:5.1f} %" for name, share in shares.items()}))
    verdict = _verdict(shares)
    print(f"\n{verdict}")
    return {
        "images_per_s": round(images / run, 2),
        "world_size": world.size,
        "model": config.model.name,
        "precision": config.train.precision,
        "global_batch_size": images,
        "loader_images_per_s": round(loader_rate, 2),
        "step_images_per_s": round(step_rate, 2),
        "seconds": {name: spread.as_dict(5) for name, spread in spreads.items()},
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "verdict": verdict,
    }


def _verdict(shares: dict[str, float]) -> str:
    others = {name: share for name, share in shares.items() if name != "compute"}
    worst = max(others, key=lambda name: others[name])
    if others[worst] < NEGLIGIBLE:
        return f"compute is the bottleneck; of the rest, {worst} takes most: {100 * others[worst]:.1f} % of the time"
    return (
        f"{worst} is the bottleneck: without it, a step would take {100 * others[worst]:.0f} % less time. "
        f"What helps: {REMEDIES[worst]}"
    )
