"""`pipeline evaluate RUN`: score one checkpoint of a run on the whole validation set, by one process or many."""

import dataclasses
import json
import time
from pathlib import Path

from pipeline.config import Config, load_config
from pipeline.errors import EXIT_OK, UserError
from pipeline.loader.build import make_eval_stream
from pipeline.model.build import Normalised, build_model
from pipeline.tracking.ledger import best_step, read_rows
from pipeline.training.checkpoint import (
    DamagedCheckpoint,
    find_newest_good,
    folder_name,
    load_state,
    verify_checkpoint,
)
from pipeline.training.data import open_data
from pipeline.training.distributed import start_world
from pipeline.training.evaluate import evaluate
from pipeline.training.preemption import StopRequest, interrupted_exit_code
from pipeline.training.run import RunFolder


def find_checkpoint(folder: RunFolder, name: str) -> tuple[Path, dict]:
    """The verified checkpoint folder that "best", "last" or a path means, and its meta. Raises UserError."""
    if name == "last":
        found = find_newest_good(folder.checkpoints, warn=print)
        if found is None:
            raise UserError(f"{folder.checkpoints} holds no good checkpoint; train first")
        return found
    if name == "best":
        step = best_step(row for row in read_rows(folder.ledger) if row.get("kind") == "eval")
        if step is None:
            raise UserError(f"{folder.ledger} holds no evaluation yet; give --checkpoint last")
        path = folder.checkpoints / folder_name(step)
    else:
        path = Path(name).expanduser()
    try:
        return path, verify_checkpoint(path)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; give another --checkpoint") from error


def evaluate_run(
    run: Path,
    checkpoint: str,
    data_root: str | None,
    batch_size: int | None,
    device: str,
    json_file: str | None,
    stop: StopRequest,
) -> int:
    """Score a checkpoint and print a table; see the verb's help. Returns the exit code."""
    folder = RunFolder(run.expanduser().resolve())
    if not folder.config.exists():
        raise UserError(f"{run} is no run folder: it has no config.yaml; give the --run_dir of a run")
    config = relocated(load_config(folder.config, verb="evaluate"), data_root, batch_size, device)
    world = start_world(config.train)
    try:
        path, meta = world.on_main(lambda: find_checkpoint(folder, checkpoint))
        index = open_data(config.data, world, print)
        model = build_model(config.model, config.model.num_classes or index.num_classes)
        model.load_state_dict(load_state(path, ["model"])["model"])
        network = Normalised(model, config.data.mean, config.data.std, config.train.channels_last).to(world.device)
        local = config.train.global_batch_size // world.size
        batch = config.train.eval_batch_size or min(local, config.train.micro_batch_size or local)
        stream = make_eval_stream(index, config.data, batch, world)
        begun = time.perf_counter()
        try:
            scores = evaluate(network, stream, world, config.train.precision, stop)
        finally:
            stream.close()
        seconds = time.perf_counter() - begun
    finally:
        world.close()
    if scores is None:
        return interrupted_exit_code()
    if world.is_main:
        facts = {"checkpoint": str(path), "step": meta["step"], **dataclasses.asdict(scores)}
        facts["images_per_s"] = round(scores.images / seconds, 1)
        for name, value in facts.items():
            print(f"  {name:<13} {value:.4f}" if isinstance(value, float) else f"  {name:<13} {value}")
        if json_file:
            Path(json_file).write_text(json.dumps(facts, indent=1) + "\n")
    return EXIT_OK


def relocated(config: Config, data_root: str | None, batch_size: int | None, device: str) -> Config:
    """A saved configuration for this machine: other places and sizes, the same recipe."""
    data = dataclasses.replace(config.data, root=data_root, index=None) if data_root else config.data
    train = dataclasses.replace(
        config.train, device=device, eval_batch_size=batch_size or config.train.eval_batch_size, compile=False
    )
    return dataclasses.replace(config, data=data, train=train)
