"""Pixels on the GPU against those on the CPU: DALI's windows resized, and each augmentation."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.synthetic.generate import Settings as Synthetic
from pipeline.dataset.synthetic.generate import generate_tree
from pipeline.insight.qualify.rows import Row, Settings, judged, skipped
from pipeline.loader.build import dali_problem, make_train_stream
from pipeline.loader.plan import make_train_plan
from pipeline.rank_info import RankInfo

_LEVELS = (0.3, 16)  # mean and greatest difference of DALI's resize from torch's, as DALI's on a CPU has
_SHARE = 1e-3  # of bytes that may differ after an augmentation, where a sum is rounded the other way


def pixels(settings: Settings) -> Iterator[Row]:
    """The same images through both devices; on a CPU DALI against the reference decoder."""
    root = settings.scratch / "pixels"
    generate_tree(root, Synthetic(classes=2, train_per_class=32, val_per_class=2, size=160, oddities=0))
    index = build_index(Path(root))
    problem = dali_problem()
    if problem:
        yield skipped("DALI", f"can't be imported ({problem})")
    else:
        one = _images(index, "dali", torch.device("cpu"))
        other = _images(index, *(("dali", _gpu()) if settings.device == "cuda" else ("reference", torch.device("cpu"))))
        difference = (one - other).abs().float()
        mean, most = difference.mean().item(), difference.max().item()
        what = "DALI on the GPU and on the CPU" if settings.device == "cuda" else "DALI and the reference decoder"
        value = f"{mean:.3f} levels apart, {most:.0f} at most"
        bounds = _LEVELS if settings.device == "cuda" else (1.0, 48)
        yield judged(what, value, f"{bounds[0]:g} and {bounds[1]}", mean <= bounds[0] and most <= bounds[1])
    if settings.device != "cuda":
        yield skipped("augmentation on the GPU", "requires a GPU")
        return
    for name, config in {
        "RandAugment": AugmentConfig(policy="randaugment-timm", num_ops=4),
        "TrivialAugment": AugmentConfig(policy="trivialaugment"),
        "color jitter": AugmentConfig(jitter=(0.3, 0.3, 0.3, 0.1)),
    }.items():
        yield _augmented(index, name, config)


def _gpu() -> torch.device:
    return torch.device("cuda", 0)


def _images(index: Index, loader: str, device: torch.device) -> torch.Tensor:
    config = DataConfig(loader=loader, image_size=64, val_size=64, val_resize=72).resolve()  # type: ignore[arg-type]
    plan = make_train_plan(index, config, TrainConfig(global_batch_size=16))
    stream = make_train_stream(index, plan, config, RankInfo(device=device))
    try:
        return torch.cat([batch.images.cpu() for batch in stream.batches(0, 4)]).int()
    finally:
        stream.close()


def _augmented(index: Index, name: str, augment: AugmentConfig) -> Row:
    config = DataConfig(loader="reference", image_size=64, val_size=64, val_resize=72).resolve()
    plan = make_train_plan(index, config, TrainConfig(global_batch_size=64), augment)
    changed = []
    for device in (torch.device("cpu"), _gpu()):
        stream = make_train_stream(index, plan, config, RankInfo(device=device), applies=augment)
        (batch,) = stream.batches(0, 1)
        stream.close()
        changed.append(batch.augmented(augment).cpu())
    share = (changed[0] != changed[1]).float().mean().item()
    return judged(name, f"{share:.1e} of the bytes differ", f"at most {_SHARE:g}", share <= _SHARE)
