"""The loaders that `bench loader` lets compete, each as its own project would have it used."""

import os
import tempfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from pipeline.insight.bench.arena import Absent
from pipeline.rank_info import RankInfo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _NoResizer:
    """In the place of `Resizer`: leaves windows as they were decoded, which is what a GPU is sent."""

    class _Done:
        def __init__(self, count: int):
            self.images = torch.empty((count, 0, 0, 3), dtype=torch.uint8)

        def result(self) -> torch.Tensor:
            return self.images

    def start(self, windows, planned) -> "_Done":
        return self._Done(len(windows))

    def close(self) -> None:
        pass


def open_stream(root: str, split: str, size: int, batch: int, threads: int | None, loader: str, prefetch: int = 2):
    """A stream of `split` as a run of one rank has it."""
    from pipeline.config import DataConfig, TrainConfig
    from pipeline.dataset.index.index import index_folder, open_index
    from pipeline.loader.build import make_eval_stream, make_train_plan, make_train_stream

    resize = round(size * 256 / 224)
    data = DataConfig(root, loader=loader, image_size=size, val_size=size, val_resize=resize, threads=threads).resolve()
    index = open_index(index_folder(Path(root)))
    if split == "val":
        return make_eval_stream(index, data, batch, RankInfo())
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=batch))
    return make_train_stream(index, plan, data, RankInfo())


def ours(
    root: str, split: str, size: int, batch: int, images: int, threads: int | None, loader: str, windows_only: bool
) -> Callable[[], int]:
    """This project's stream; with `windows_only` no window is resized: the CPU's part where a GPU trains."""
    stream = open_stream(root, split, size, batch, threads, loader)
    if windows_only:
        stream.decoder.resizer = _NoResizer()
    steps = max(1, images // batch)
    first = [0]

    def one_round() -> int:
        start = first[0]
        if split == "val":  # the validation images from the first on, again in each round
            return sum(map(len, stream.batches(0, min(steps, stream.plan.steps(1)))))
        first[0] += steps
        return sum(map(len, stream.batches(start, start + steps)))

    return one_round


def pil_decode(root: str, images: int) -> Callable[[], int]:
    """PIL alone: the whole image decoded in one thread, nothing else; the bytes are in memory."""
    from PIL import Image

    from pipeline.dataset.index.index import index_folder, open_index

    split = open_index(index_folder(Path(root))).splits["train"]
    ids = np.random.default_rng(0).permutation(len(split))[:images]
    data = [split.read(int(sample)) for sample in ids]

    def one_round() -> int:
        for item in data:
            with Image.open(BytesIO(item)) as image:
                image.convert("RGB")
        return len(data)

    return one_round


def class_folders(root: str, split: str) -> Path:
    """The folder of class folders, as ImageFolder wants it. Raises Absent where the data are shards."""
    from pipeline.dataset.index.index import index_folder, open_index

    index = open_index(index_folder(Path(root)))
    part = index.splits[split]
    if part.shards:
        raise Absent("reads no tar shards")
    path = part.path(0).parent.parent
    if len([entry for entry in path.iterdir() if entry.is_dir()]) != index.num_classes:
        raise Absent(f"wants class folders; {path} has none")
    return path


def torchvision_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """ImageFolder and DataLoader with PIL, as in torchvision's reference training script: float32, normalized."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets, transforms

    if split == "train":
        cut = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        cut = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    transform = transforms.Compose([*cut, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    dataset = datasets.ImageFolder(str(class_folders(root, split)), transform)
    sampler = RandomSampler(dataset, num_samples=images)
    loader = DataLoader(dataset, batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(targets) for _, targets in loader)


def timm_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """timm's create_loader with its uint8 collation; what it does on the device afterwards is left out."""
    try:
        from timm.data import create_dataset, create_loader
    except ImportError as error:
        raise Absent(f"timm can't be imported ({error})") from error
    dataset = create_dataset("", str(class_folders(root, split)))
    options = {"color_jitter": 0.0} if split == "train" else {"crop_pct": 224 / 256}
    prefetching = create_loader(
        dataset,
        (3, size, size),
        batch,
        is_training=split == "train",
        interpolation="bilinear",
        num_workers=max(1, workers),
        device=torch.device("cpu"),
        **options,
    )
    loader = prefetching.loader

    return _rounds(loader, images)


def ffcv_loader(root: str, split: str, size: int, batch: int, images: int, workers: int) -> Callable[[], int]:
    """FFCV's loader on the same JPEG bytes, written into its own format first (not timed)."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor
        from ffcv.writer import DatasetWriter
    except (ImportError, OSError) as error:
        raise Absent(f"ffcv can't be imported ({error})") from error
    from torchvision.datasets import ImageFolder

    folder = Path(tempfile.mkdtemp(prefix="bench-ffcv-"))
    path = folder / f"{split}.beton"
    writer = DatasetWriter(str(path), {"image": RGBImageField(write_mode="jpg"), "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(ImageFolder(str(class_folders(root, split))))
    if split == "train":
        image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), ToTensor()]
    else:
        image = [CenterCropRGBImageDecoder((size, size), ratio=224 / 256), ToTensor()]
    loader = Loader(
        str(path),
        batch_size=batch,
        num_workers=max(1, workers),
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )

    return _rounds(loader, images)


def _rounds(loader: Iterable, images: int) -> Callable[[], int]:
    """Whole passes over a loader of (images, targets) until `images` have come; returns how many did."""

    def one_round() -> int:
        count = 0
        while count < images:
            for _, targets in loader:
                count += len(targets)
        return count

    return one_round


def share_threads(threads: int | None) -> int:
    """Threads, or worker processes, for every contender alike."""
    return threads or len(os.sched_getaffinity(0))
