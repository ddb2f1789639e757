"""What the public loaders have in common: where they deliver, which classes there are, and their end."""

from functools import cached_property
from typing import Any, ClassVar, Self

import torch

from pipeline.config import Config
from pipeline.dataset.index.index import Index
from pipeline.dataset.layouts.find import Alone
from pipeline.errors import UserError
from pipeline.loader.setup import Finisher, Reader, find_rank, open_root
from pipeline.rank_info import RankInfo


class LoaderBase:
    """`TrainLoader` and `EvalLoader` set config, raw, place and _reader."""

    config: Config
    raw: bool
    place: RankInfo
    _reader: Reader
    _split: ClassVar[Alone]  #: which it reads

    @classmethod
    def from_config(
        cls,
        config: Config,
        *,
        raw: bool = False,
        device: torch.device | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> Self:
        """The batches that `pipeline train` would train on or score with this configuration, e.g. with that of
        `pipeline.load_config("resnet152", {"data.root": "/data/imagenet"})`. The arguments are the constructor's."""
        loader = cls.__new__(cls)
        loader._setup(config, raw, find_rank(rank, world_size, device))
        return loader

    def _setup(self, config: Config, raw: bool, place: RankInfo) -> None:
        raise NotImplementedError

    @cached_property
    def index(self) -> Index:
        """The opened data set; its index is built first where there is none."""
        return open_root(self.config.data, self._split)

    @property
    def device(self) -> torch.device:
        """Where batches are delivered."""
        return self.place.device

    @property
    def classes(self) -> list[str]:
        """The classes' folder names, in the order of their labels."""
        return list(self.index.synsets)

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return self.index.num_classes

    @cached_property
    def _finish(self) -> Finisher:
        return Finisher(self.config.data, self.config.augment, self.num_classes, self.device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises UserError: a copy in another process would read this one's share of the images."""
        raise UserError(
            f"a {type(self).__name__} can't be pickled or copied, as its rank and threads are those of this process; "
            "make one in each process (the position of a TrainLoader: state_dict(), load_state_dict())"
        )

    def __getitem__(self, number: Any) -> Any:
        """Raises UserError: torch's DataLoader takes the loader for a list of samples."""
        raise UserError(
            f"a {type(self).__name__} has no items: it makes whole batches, with threads of its own; loop over it as "
            "it is, without torch's DataLoader"
        )

    def close(self) -> None:
        """End the threads that read and decode. The loader can be used again."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
