"""`EvalLoader`: validation batches, each image exactly once over all ranks, for a loop of your own."""

from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.config import AugmentConfig, Config, DataConfig
from pipeline.loader.arguments import make_config, with_root
from pipeline.loader.build import make_eval_stream
from pipeline.loader.loader_base import LoaderBase
from pipeline.loader.setup import Reader, find_rank
from pipeline.loader.stream import Stream
from pipeline.rank_info import RankInfo

#: options of the command line that are arguments of this loader under another name
_ARGUMENTS = {"data.val_size": "image_size", "data.val_resize": "resize"}


class EvalLoader(LoaderBase):
    """The validation images of a data set: resized, cropped from the middle, and each exactly once over all ranks.

    ```python
    for images, targets in EvalLoader("/data/imagenet", batch_size=256, image_size=224):
        correct += (model(images).argmax(1) == targets).sum()
    ```

    Yields (images, targets) of this rank's share. images: float32 [B, 3, H, W], channels_last, normalized, on `device`;
    with `raw` uint8 [B, H, W, 3]. targets: int64 [B]. The last batch may be short, and one rank may have a batch more
    than another: add up over ranks after the loop, not inside it. An image that can't be read is left out.

    Args:
        root: data root, or a folder with one folder of images a class.
        batch_size: images at once over all ranks.
        image_size: pixels of an image's side. resize: of its shorter side before the crop; default: image_size *
            256 / 224.
        raw: uint8 images without normalization.
        device, rank, world_size, data: as for `TrainLoader`; of `data`, `val_crop_ratio` can stand in for `resize`.

    Raises UserError (a ValueError) in one line for what can't be done, TransientError for what broke underneath.
    """

    _split = "val"

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 256,
        image_size: int | None = None,
        resize: int | None = None,
        *,
        raw: bool = False,
        device: torch.device | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        data: DataConfig | None = None,
    ):
        settings = with_root(data, root, val_size=image_size, val_resize=resize)
        config = make_config(settings, AugmentConfig(), batch_size, names=_ARGUMENTS)
        self._setup(config, raw, find_rank(rank, world_size, device), config.train.global_batch_size)

    def _setup(self, config: Config, raw: bool, place: RankInfo, batch_size: int | None = None) -> None:
        self.config, self.raw, self.place = config, raw, place
        self._reader = Reader()
        if batch_size is None:
            self.local_batch_size = config.train.local_eval_batch_size(place.size)
        else:
            self.local_batch_size = -(-batch_size // place.size)

    @property
    def num_samples(self) -> int:
        """Images of all ranks together."""
        return len(self.index.splits["val"])

    def __len__(self) -> int:
        """Batches of this rank."""
        rank, size = self.place.rank, self.place.size
        own = self.num_samples * (rank + 1) // size - self.num_samples * rank // size
        return -(-own // self.local_batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in self._reader.read(self._open, 0, len(self)):
            yield (batch.images, batch.targets) if self.raw else self._finish(batch)

    def _open(self) -> Stream:
        return make_eval_stream(self.index, self.config.data, self.local_batch_size, self.place)
