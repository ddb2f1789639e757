"""What `pipeline evaluate` scores: the networks of a run's checkpoint, or torchvision's published weights."""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pipeline.config import Config, load_config
from pipeline.dataset.index.index import Index, has_index, locate_index, open_index
from pipeline.errors import UserError
from pipeline.evaluation.class_map import imagenet_classes
from pipeline.logs import logger
from pipeline.model.build import Normalized, build_model
from pipeline.model.heads import count_outputs
from pipeline.model.published import Published
from pipeline.model.weights import load_whole, start_from
from pipeline.run_paths import list_checkpoints
from pipeline.tracking.eval_rows import best_step
from pipeline.tracking.ledger_rows import read_rows
from pipeline.training.ranks.world import World
from pipeline.training.run_folder.checkpoint import load_state
from pipeline.training.run_folder.folder import RunFolder
from pipeline.training.run_folder.manifest import DamagedCheckpoint, find_newest_good, verify_checkpoint
from pipeline.training.run_folder.shared_state import read_on_rank_zero

FILES = {"raw": "model", "ema": "ema"}  # weights -> their file in a checkpoint


@dataclass(frozen=True)
class ScoredNetwork:
    """What is scored: networks by name on the device, their outputs, their classes (None: not known), and where they
    come from: checkpoint, its meta."""

    networks: dict[str, nn.Module]
    outputs: int
    classes: list[str] | None
    path: Path | None = None
    meta: dict = dataclasses.field(default_factory=dict)


def find_checkpoint(folder: RunFolder, name: str) -> tuple[Path, dict]:
    """The verified checkpoint folder that "best", "last", a step, a folder's name or a path means, and its meta.

    "auto": the best one, or the last one of a run with no evaluation, after a line that says so. Raises UserError.
    """
    if name == "auto":
        name = "best" if _best_step(folder) is not None else "last"
        if name == "last":
            logger.info(f"{folder.path} has no evaluation, so there is no best checkpoint; the newest one is used")
    if name == "last":
        found = find_newest_good(folder.checkpoints, warn=logger.warning)
        if found is None:
            raise UserError(f"{folder.checkpoints} holds no good checkpoint; train first")
        return found
    if name == "best":
        step = _best_step(folder)
        if step is None:
            raise UserError(f"{folder.ledger} holds no evaluation yet; give --checkpoint last")
        path = folder.checkpoint(step)
        if not path.is_dir():
            raise UserError(
                f"the best checkpoint of {folder.path}, {path.name}, is not there; give --checkpoint last, or one of "
                f"these: {_names(folder)}"
            )
    else:
        own = folder.checkpoint(int(name)) if name.isdecimal() else folder.checkpoints / name
        path = own if own.is_dir() else Path(name).expanduser()
        if not path.is_dir():
            raise UserError(
                f"--checkpoint {name} is not a checkpoint; give best, last, or one of {folder.path}: {_names(folder)}"
            )
    try:
        return path, verify_checkpoint(path)
    except DamagedCheckpoint as error:
        raise UserError(f"{error}; give another --checkpoint, of these: {_names(folder)}") from error


def _names(folder: RunFolder) -> str:
    """The names of a run's checkpoint folders, oldest first."""
    return ", ".join(found.name for _, found in reversed(list_checkpoints(folder.checkpoints))) or "none"


def _best_step(folder: RunFolder) -> int | None:
    """The step with the highest top-1; None where nothing was evaluated."""
    return best_step(row for row in read_rows(folder.ledger) if row.get("kind") == "eval")


def normalized(model: nn.Module, config: Config, world: World) -> nn.Module:
    return Normalized(model, config.data.mean, config.data.std, config.train.channels_last).to(world.device)


def load_published(config: Config, published: Published, index: Index, world: World) -> ScoredNetwork:
    """torchvision's published weights, downloaded by rank 0 where they are not cached. Collective."""
    model = build_model(config.model, published.outputs)
    world.on_rank_zero(lambda: start_from(model, config.model))
    network = normalized(model, config, world)
    for value in network.state_dict().values():
        torch.distributed.broadcast(value, src=0)
    return ScoredNetwork({published.name: network}, published.outputs, imagenet_classes(index, published.outputs))


def load_run(weights: str, checkpoint: str, config: Config, folder: RunFolder, world: World) -> ScoredNetwork:
    """The networks of a run's checkpoint. weights: "raw", "ema", their average, or "both". Collective."""
    path, meta = world.on_rank_zero(lambda: find_checkpoint(folder, checkpoint))
    wanted = ["raw", "ema"] if weights == "both" else [weights]
    there = [name for name in wanted if f"{FILES[name]}.pt" in meta["files"]]
    if not there:
        raise UserError(f"{path} has no averaged weights (no ema.decay or ema.last_epochs); give --weights raw")
    networks, outputs = {}, 0
    for name in there:
        state = read_on_rank_zero(functools.partial(load_state, path, [FILES[name]]), world)[FILES[name]]
        outputs = count_outputs(config.model, state)
        model = build_model(config.model, outputs)
        load_whole(model, state)
        networks[name] = normalized(model, config, world)
    return ScoredNetwork(networks, outputs, meta.get("classes") or classes_of(folder), path, meta)


def classes_of(folder: RunFolder) -> list[str] | None:
    """The classes of a run's own data set, where that is still here: older checkpoints do not say."""
    data = load_config(folder.config, verb="evaluate").data
    folder_of_index = locate_index(data)
    known = (data.index or data.root) and has_index(folder_of_index)
    return list(open_index(folder_of_index).synsets) if known else None
