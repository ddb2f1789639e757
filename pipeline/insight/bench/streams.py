"""What `bench loader` compares: the project's streams of batches, and PIL's decoding alone as a yardstick."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config import DataConfig, TrainConfig
from pipeline.dataset.index.index import index_folder, open_index
from pipeline.loader.build import make_eval_stream, make_train_stream
from pipeline.loader.plan import make_train_plan
from pipeline.loader.stream import Stream
from pipeline.rank_info import RankInfo

Loader = Literal["auto", "dali", "reference"]


class _NoResizer:
    """Replaces the stream's resizer: crops stay as they were decoded, which is what a GPU would be sent."""

    class _Done:
        def __init__(self, count: int):
            self.images = torch.empty((count, 0, 0, 3), dtype=torch.uint8)

        def result(self) -> torch.Tensor:
            return self.images

    def start(self, windows: Any, planned: Any) -> "_Done":
        return self._Done(len(windows))

    def close(self) -> None:
        pass


def open_stream(
    root: str, split: str, size: int, batch: int, threads: int | None, loader: Loader, index_at: str | None = None
) -> Stream:
    """The stream of `split` ("train" or "val") of a run with one rank, on the CPU. index_at: folder of the index."""
    resize = round(size * 256 / 224)
    data = DataConfig(root, loader=loader, image_size=size, val_size=size, val_resize=resize, threads=threads).resolve()
    index = open_index(Path(index_at) if index_at else index_folder(Path(root)))
    rank = RankInfo()
    if split == "val":
        return make_eval_stream(index, data, batch, rank)
    plan = make_train_plan(index, data, TrainConfig(global_batch_size=batch))
    return make_train_stream(index, plan, data, rank)


def stream_rounds(
    root: str,
    split: str,
    size: int,
    batch: int,
    images: int,
    threads: int | None,
    loader: Loader,
    crops_only: bool = False,
    index_at: str | None = None,
) -> Callable[[], int]:
    """A round reads `images` images. crops_only: no crop is resized, as where a GPU trains and does that."""
    stream = open_stream(root, split, size, batch, threads, loader, index_at)
    if crops_only:
        stream.decoder.resizer = _NoResizer()  # type: ignore[attr-defined]  # DALI's decoder has one
    steps = max(1, images // batch)
    start = 0

    def one_round() -> int:
        nonlocal start
        if split == "val":  # every round reads the validation images from the first on
            return sum(map(len, stream.batches(0, min(steps, stream.plan.steps(1)))))
        start += steps
        return sum(map(len, stream.batches(start - steps, start)))

    return one_round


def pil_decode(root: str, images: int, index_at: str | None = None) -> Callable[[], int]:
    """A round decodes whole training images with PIL in one thread; their bytes are in memory."""
    from PIL import Image

    split = open_index(Path(index_at) if index_at else index_folder(Path(root))).splits["train"]
    sample_ids = np.random.default_rng(0).permutation(len(split))[:images]
    encoded = [split.read(int(sample_id)) for sample_id in sample_ids]

    def one_round() -> int:
        for data in encoded:
            with Image.open(BytesIO(data)) as image:
                image.convert("RGB")
        return len(encoded)

    return one_round
