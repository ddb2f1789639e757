"""How far the loaders' pixels are from torchvision's transforms on PIL, on images of your own.

    python benchmarks/pixels.py FOLDER [--epochs 3] [--size 224] [--resize 256] > benchmarks/pixels.json

FOLDER holds JPEG files, at any depth. For each loader and filter, on a CPU: the share of the values (one channel of one
pixel) that differ, the mean and the largest difference in levels of 255, in training (RandomResizedCrop windows) and in
validation (Resize, CenterCrop). Geometric operations of the augmentation policies are compared in the same way with
torchvision.transforms.v2.functional.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import hflip, resized_crop
from torchvision.transforms.v2 import functional as v2

from pipeline.augment.apply import PixelOps
from pipeline.augment.ops import apply_ops
from pipeline.augment.params import AugmentParams
from pipeline.augment.policies import CODE
from pipeline.config import DataConfig, TrainConfig
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.scan import build_index
from pipeline.loader import build
from pipeline.loader.plan import make_train_plan
from pipeline.rank_info import RankInfo

Pair = tuple[np.ndarray, np.ndarray]  # ours and theirs, uint8 [H, W, 3]


def make_index(folder: Path, root: Path) -> Index:
    """The files of `folder` as a training and a validation split of one class each."""
    for split in ("train", "val"):
        (root / split / "all").mkdir(parents=True)
        for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))):
            shutil.copy(path, root / split / "all" / f"{number:06}.JPEG")
    return build_index(root)


def whole(index: Index, split: str, sample: int) -> Image.Image:
    return Image.open(index.splits[split].path(sample)).convert("RGB")


def training_pairs(index: Index, data: DataConfig, epochs: int) -> Iterator[Pair]:
    resolved, batch = data.resolve(), 16
    plan = make_train_plan(index, resolved, TrainConfig(global_batch_size=batch))
    stream = build.make_train_stream(index, plan, resolved, RankInfo())
    mode, size = InterpolationMode(data.interpolation), [resolved.size_at(0)] * 2
    last = epochs * plan.samples // batch
    for step, images in enumerate(stream.batches(0, last)):
        planned = plan.local(step)
        for i, (left, top, width, height) in enumerate(planned.windows.tolist()):
            image = whole(index, "train", planned.ids[i])
            expected = resized_crop(image, top, left, height, width, size, mode)
            yield images.images[i].numpy(), np.asarray(hflip(expected) if planned.flips[i] else expected)
    stream.close()


def validation_pairs(index: Index, data: DataConfig) -> Iterator[Pair]:
    resolved = data.resolve()
    stream = build.make_eval_stream(index, resolved, 16, RankInfo())
    transform = Compose(
        [Resize(resolved.val_resize, InterpolationMode(data.interpolation)), CenterCrop(resolved.val_size)]
    )
    for batch in stream.batches(0, stream.plan.steps(1)):
        for i, sample in enumerate(batch.ids.tolist()):
            yield batch.images[i].numpy(), np.asarray(transform(whole(index, "val", sample)))
    stream.close()


def geometry_pairs(index: Index, size: int, name: str) -> Iterator[Pair]:
    """A bilinear shear or rotation of the middle of each image, by an amount in the policies' range."""
    numbers = np.random.default_rng(0)
    for sample in range(len(index.splits["val"])):
        image = torch.from_numpy(np.array(CenterCrop(size)(whole(index, "val", sample))))
        amount = np.float32(numbers.uniform(-30, 30) if name == "rotate" else numbers.uniform(-0.3, 0.3))
        drawn = AugmentParams(np.full((1, 1), CODE[name], np.uint8), np.full((1, 1), amount, np.float32))
        ours = apply_ops(image[None], PixelOps.of(drawn, size, torch.device("cpu")), "bilinear", None)[0]
        planes, mode = image.permute(2, 0, 1), InterpolationMode.BILINEAR
        if name == "rotate":
            theirs = v2.rotate(planes, float(amount), mode)
        else:
            degrees = math.degrees(math.atan(float(amount)))
            shear = [degrees, 0.0] if name == "shear_x" else [0.0, degrees]
            theirs = v2.affine(planes, 0.0, [0, 0], 1.0, shear, mode, None, [0, 0])
        yield ours.numpy(), theirs.permute(1, 2, 0).numpy()


def summary(pairs: Iterator[Pair]) -> dict[str, float]:
    """Counts over all pairs: values compared, share that differ, share off by more than one level, mean, largest."""
    levels = np.zeros(256, np.int64)
    for ours, theirs in pairs:
        levels += np.bincount(np.abs(ours.astype(int) - theirs).ravel(), minlength=256)
    count = levels.sum()
    return {
        "values": int(count),
        "differ": float(f"{levels[1:].sum() / count:.3g}"),
        "differ_by_2_or_more": float(f"{levels[2:].sum() / count:.3g}"),
        "mean": float(f"{(levels * np.arange(256)).sum() / count:.3g}"),
        "largest": int(np.flatnonzero(levels)[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--resize", type=int, default=256)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        index = make_index(options.folder, Path(scratch) / "data")
        for loader in ("dali", "reference"):
            for mode in ("bilinear", "bicubic"):
                size = {"image_size": options.size, "val_size": options.size, "val_resize": options.resize}
                data = DataConfig(loader=loader, interpolation=mode, **size)
                found[f"{loader} {mode} training"] = summary(training_pairs(index, data, options.epochs))
                found[f"{loader} {mode} validation"] = summary(validation_pairs(index, data))
                print(f"{loader} {mode} done", file=sys.stderr)
        for name in ("shear_x", "shear_y", "rotate"):
            found[f"{name} bilinear"] = summary(geometry_pairs(index, options.size, name))
    versions = {"torch": torch.__version__, "pillow": PIL.__version__}
    json.dump({"images": len(index.splits["val"]), **versions, "results": found}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
