"""`pipeline evaluate`: score a run's checkpoint, or published weights, on a validation set, by one process or many."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from pipeline.command import split_list
from pipeline.config import Config, DataConfig, ModelConfig, RawConfig, ResolvedDataConfig, TrainConfig, load_config
from pipeline.config.augment import UNAUGMENTED
from pipeline.config.train import Precision
from pipeline.dataset.index.index import Index
from pipeline.errors import EXIT_OK, UserError
from pipeline.evaluation.checkpoints import ScoredNetwork, load_published, load_run
from pipeline.evaluation.class_map import class_positions, order_warning
from pipeline.evaluation.partial_sums import PartialSums, program_versions
from pipeline.evaluation.scores import Result, print_scores
from pipeline.loader.build import make_eval_stream, make_train_stream
from pipeline.loader.plan import make_train_plan
from pipeline.logs import logger
from pipeline.model.published import PREFIX, Published, find_published
from pipeline.model.sizes import check_to_score
from pipeline.run_paths import not_a_run_message
from pipeline.training.data import open_data
from pipeline.training.evaluate import evaluate
from pipeline.training.guard import rollbacks_of
from pipeline.training.ranks.stop_request import StopRequest, interrupted_exit_code
from pipeline.training.ranks.world import World, start_world
from pipeline.training.recalibrate import keeping_buffers, recalibrate
from pipeline.training.run_folder.folder import RunFolder
from pipeline.training.validate import precision_warning

Device = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True)
class Request:
    """What the verb was asked for; see its help."""

    run: str
    checkpoint: str = "best"
    weights: str = "both"
    model: str = "resnet152"
    data_root: str | None = None
    index: str | None = None
    sizes: str | None = None
    ten_crop: bool = False
    flip: bool | None = None
    recalibrate: int | None = None
    per_class: str | None = None
    batch_size: int | None = None
    precision: Precision | None = None
    device: Device = "auto"
    json: str | None = None

    @property
    def published(self) -> bool:
        return self.weights.startswith(PREFIX)


def parse_sizes(text: str | None, data: ResolvedDataConfig) -> list[tuple[int, int]]:
    """(size, resize) pairs in pixels of "224,288/320"; a size alone keeps the recipe's share. Raises UserError."""
    if text is None:
        return [(data.val_size, data.val_resize)]
    pairs = []
    for part in split_list(text):
        size, _, resize = part.partition("/")
        good = size.isdecimal() and int(size) > 0 and (not resize or (resize.isdecimal() and int(resize) >= int(size)))
        if not good:
            raise UserError(f"--sizes {text}: give pixels, or crop/resize in pixels, e.g. 224,288 or 224/232")
        pairs.append((int(size), int(resize) if resize else round(int(size) * data.val_resize / data.val_size)))
    return pairs


def evaluate_run(ask: Request, stop: StopRequest) -> int:
    """Score and print; see the verb's help. Returns the exit code."""
    if not ask.published and ask.weights not in ("raw", "ema", "both"):
        raise UserError(f"--weights {ask.weights}: give raw, ema, both, or {PREFIX}NAME, e.g. {PREFIX}IMAGENET1K_V2")
    published = find_published(ask.model, ask.weights.removeprefix(PREFIX)) if ask.published else None
    folder = RunFolder(Path(ask.run).expanduser().resolve())
    if published is None and not folder.config.exists():
        raise UserError(not_a_run_message(ask.run, checkpoints=True))
    config = published_config(ask, published) if published else load_config(folder.config, verb="evaluate")
    config = relocated(config, ask.data_root, ask.batch_size, ask.device, ask.index)
    if ask.precision:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=ask.precision))
    root = Path(config.data.root).expanduser()
    if folder is not None and not root.is_dir():
        if ask.data_root:
            raise UserError(f"--data_root {ask.data_root} is not a folder; give the one that holds the data set")
        raise UserError(f"the run's data is not at {root} on this machine; give --data_root DIR, where it lies here")
    sizes = parse_sizes(ask.sizes, config.data)
    if ask.recalibrate is not None and ask.recalibrate < 0:
        raise UserError(f"--recalibrate {ask.recalibrate}: give a number of training batches, or 0 for none")
    check_to_score(config.model, (size for size, _ in sizes), f"--sizes {ask.sizes}" if ask.sizes else "the run's size")
    world = start_world(config.train)
    if config.data.decode == "mixed" and world.device.type == "cpu":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, decode="cpu"))
        if world.is_rank_zero:
            logger.info(
                "the run's images were decoded on a GPU; scored here on those of the CPU, which differ a little"
            )
    slow = precision_warning(config.train.precision, world.device.type, "--precision fp32")
    if slow and world.is_rank_zero:
        logger.warning("%s", slow)
    try:
        index = open_data(config.data, world, logger.info, alone="val")
        if published:
            subject = load_published(config, published, index, world)
        else:
            subject = load_run(ask.weights, ask.checkpoint, config, folder, world)
        results = score_all(ask, config, subject, index, sizes, world, stop, None if published else folder)
    finally:
        world.close()
    if results is None:
        if world.is_rank_zero:
            logger.info("interrupted; run the same command %s", "again" if published else "to resume")
        return interrupted_exit_code()
    if world.is_rank_zero:
        print_scores(results, subject, published, ask.json, ask.per_class)
        for result in results:
            if result.kept is not None:
                result.kept.remove()
    return EXIT_OK


def relocated(
    config: Config, data_root: str | None, batch_size: int | None, device: Device, index: str | None = None
) -> Config:
    """A saved configuration for this machine: other places and sizes, the same recipe."""
    data = dataclasses.replace(config.data, root=data_root, index=None) if data_root else config.data
    data = dataclasses.replace(data, index=index) if index else data
    train = dataclasses.replace(
        config.train, device=device, eval_batch_size=batch_size or config.train.eval_batch_size, compile=False
    )
    return dataclasses.replace(config, data=data, train=train)


def published_config(ask: Request, published: Published) -> Config:
    """The configuration that published weights are scored with: theirs, in fp32."""
    if not ask.data_root:
        raise UserError("--data_root is missing: give the folder that holds the validation images")
    data = DataConfig(
        image_size=published.size,
        val_size=published.size,
        val_resize=published.resize,
        interpolation="bicubic" if published.bicubic else "bilinear",
        mean=published.mean,
        std=published.std,
    )
    model = ModelConfig(name=ask.model, num_classes=published.outputs, weights=published.name)
    return RawConfig(data=data, model=model, train=TrainConfig(precision="fp32")).resolve()


def score_all(
    ask: Request,
    config: Config,
    subject: ScoredNetwork,
    index: Index,
    sizes: list[tuple[int, int]],
    world: World,
    stop: StopRequest,
    folder: RunFolder | None = None,
) -> list[Result] | None:
    """Each network at each size; None if any rank was asked to stop. folder: that keeps partial sums. Collective."""
    positions = class_positions(index.synsets, subject.classes, subject.outputs, str(index.root))
    in_order = subject.classes is None and positions.tolist() == list(range(subject.outputs))
    if in_order and world.is_rank_zero and (warning := order_warning(index.synsets)):
        logger.warning("%s", warning)
    folders = list(zip(index.synsets, index.words, positions.tolist(), strict=True))
    labels = positions[np.ascontiguousarray(index.splits["val"].records["label"], np.int64)]
    batch = config.train.local_eval_batch_size(world.size)
    flip = config.evaluation.flip if ask.flip is None else ask.flip
    count = config.evaluation.recalibrate_batches if ask.recalibrate is None else ask.recalibrate
    programs = world.on_rank_zero(program_versions) if folder is not None else {}
    results = []
    for name, network in subject.networks.items():
        with keeping_buffers(network):
            if count and not recalibrated(network, config, subject, index, count, world, stop):
                return None
            for size, resize in sizes:
                data = dataclasses.replace(config.data, val_size=size, val_resize=resize)
                kept = None
                if folder is not None:
                    facts = {
                        "files": subject.meta["files"],
                        "index": index.fingerprint,
                        "weights": name,
                        "data": [size, resize, data.interpolation, data.loader, data.mean, data.std],
                        "settings": [batch, ask.ten_crop, flip, count, config.train.precision, world.device.type],
                        "labels": positions.tolist(),
                        "programs": programs,
                    }
                    kept = PartialSums(folder.evaluation, facts, world, f"{name} at {size} pixels")
                stream = make_eval_stream(index, data, batch, world, ask.ten_crop, labels)
                begun = time.perf_counter()
                try:
                    found = evaluate(
                        network,
                        stream,
                        world,
                        config.train.precision,
                        stop,
                        subject.outputs,
                        flip,
                        ask.ten_crop,
                        sorted(positions.tolist()) if index.num_classes < subject.outputs else None,
                        kept,
                    )
                finally:
                    stream.close()
                if found is None:
                    return None
                seconds = time.perf_counter() - begun if kept is None else kept.seconds
                results.append(Result(name, size, resize, found, seconds, folders, kept))
    return results


def recalibrated(
    network: nn.Module,
    config: Config,
    subject: ScoredNetwork,
    index: Index,
    count: int,
    world: World,
    stop: StopRequest,
) -> bool:
    """Recompute BatchNorm's statistics over the last `count` training batches; False if any rank was asked to stop."""
    if subject.meta.get("index_fingerprint") != index.fingerprint:
        raise UserError(f"--recalibrate {count} needs the run's own data set, {index.root} is another; give 0")
    plain = dataclasses.replace(UNAUGMENTED, repeats=config.augment.repeats)  # as `recalibrate` looks at them
    plan = make_train_plan(index, config.data, config.train, plain)
    plan.reshuffle([made.to for made in rollbacks_of(subject.meta) if made.reshuffle])
    stream = make_train_stream(index, plan, config.data, world, applies=plain)
    step = subject.meta["step"]
    skip = frozenset(sample for sample, _ in subject.meta["blacklist"])
    try:
        last = range(max(0, step - count), max(step, 1))
        at_once = config.train.local_micro_batch_size(world.size)
        return recalibrate(network, stream, last, skip, world, config.train.precision, stop, at_once)
    finally:
        stream.close()
