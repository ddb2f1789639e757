"""`TrainLoader`: the training batches of a run, for a loop of your own."""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.config import AugmentConfig, Config, DataConfig, RawConfig, semantic_config
from pipeline.config.names import rename_flat
from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.loader.arguments import as_argument, differences, make_config, whole_number, with_root
from pipeline.loader.build import check_shares, make_train_stream
from pipeline.loader.loader_base import LoaderBase
from pipeline.loader.plan import TrainPlan, make_train_plan
from pipeline.loader.setup import Reader, find_rank
from pipeline.loader.stream import Stream
from pipeline.logs import logger
from pipeline.rank_info import RankInfo

_FORMAT = 1


class TrainLoader(LoaderBase):
    """The training batches of an image data set, as a pure function of (data set, settings, seed, step).

    ```python
    loader = TrainLoader("/data/imagenet", batch_size=256, image_size=224, seed=0, augment="trivialaugment", mixup=0.2)
    for epoch in range(90):
        for images, targets in loader.epoch(epoch):
            ...
    torch.save(loader.state_dict(), file)     # load_state_dict(...) resumes inside the epoch, on any number of ranks
    ```

    Yields (images, targets) of this rank's part of each global batch. images: float32 [B, 3, H, W], channels_last, on
    `device`: cropped, flipped, augmented, normalized and mixed. targets: int64 [B], or, with `mixup` or `cutmix`,
    float32 [B, classes]. With `raw`: images uint8 [B, H, W, 3], cropped and flipped, and targets int64 [B].

    The global batches of an epoch are the same on any number of ranks. Epochs follow each other without a gap: a batch
    at an epoch's border holds the last samples of one and the first of the next, so no sample is dropped or repeated,
    and the number of batches of an epoch may differ by one.

    Args:
        root: data root: an ILSVRC root, a folder with train/ (val/ is not needed), or packed shards.
        batch_size: images a step over all ranks; a multiple of the number of ranks.
        image_size: pixels of an image's side.
        seed: of order, crops and augmentation; 0 to 2^63 - 1.
        augment: a policy ("none", "randaugment", "randaugment-timm", "trivialaugment", "autoaugment"), or an
            `AugmentConfig` with all settings.
        mixup, cutmix: parameters of their beta distributions, 0: off; in place of those of `augment`.
        num_classes: columns of soft targets; default: the classes of the data set.
        raw: uint8 images without normalization, for code that does the rest itself. With an augmentation it is refused,
            as nobody would apply that.
        device: where batches go; default: this rank's GPU, or the CPU.
        rank, world_size: default: as torch.distributed says, or a process alone.
        data: further settings of `pipeline.config.DataConfig`: crop_area, crop_ratio, flip, mean, std, interpolation,
            loader ("dali" or "reference"), threads, prefetch, index, max_unreadable, start_size, ...

    The data set is opened at the first use; its index is built first where there is none, by one process. A sample that
    can't be read is replaced by another, by a rule that all ranks and all restarts follow; see `unreadable`.

    Raises UserError (a ValueError) in one line for what can't be done, TransientError for what broke underneath.
    """

    _split = "train"

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 256,
        image_size: int | None = None,
        seed: int = 0,
        *,
        augment: str | AugmentConfig = "none",
        mixup: float | None = None,
        cutmix: float | None = None,
        num_classes: int | None = None,
        raw: bool = False,
        device: torch.device | str | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        data: DataConfig | None = None,
    ):
        if isinstance(augment, str):
            augment = AugmentConfig(policy=_policy(augment))
        if not isinstance(augment, AugmentConfig):
            raise UserError(
                f"augment is {augment!r:.80}: give the name of a policy, such as 'none', or an AugmentConfig"
            )
        augment = dataclasses.replace(
            augment,
            mixup=augment.mixup if mixup is None else mixup,
            cutmix=augment.cutmix if cutmix is None else cutmix,
        )
        settings = with_root(data, root, image_size=image_size)
        config = make_config(settings, augment, batch_size, seed, num_classes)
        self._setup(config, raw, find_rank(rank, world_size, device))

    def _setup(self, config: Config, raw: bool, place: RankInfo) -> None:
        self.config, self.raw, self.place = config, raw, place
        if raw and (config.augment.draws or config.augment.mixes or config.data.pad_crop is not None):
            raise UserError("raw=True applies no augmentation, and one is asked for; give raw=False, or leave that out")
        try:
            check_shares(config, self.place.size)
        except UserError as error:
            raise UserError(as_argument(str(error))) from None
        self.step = 0  #: batches that were yielded, since the beginning of epoch 0; the index of the next one
        self._resumed_at = 0  # epochs are not begun before this step
        self._reader = Reader(reads_on=True)

    # --- what there is

    @cached_property
    def plan(self) -> TrainPlan:
        """Which samples each step sees, and how they are cut."""
        plan = make_train_plan(self.index, self.config.data, self.config.train, self.config.augment)
        if plan.samples < plan.global_batch_size:
            logger.warning(
                "batch_size is %s, and the data set has %s: each batch holds some of them more than once",
                f"{plan.global_batch_size:,}",
                count(plan.samples, "training image"),
            )
        return plan

    @property
    def num_classes(self) -> int:
        """Classes of the data set, or as given. Raises UserError where that is less."""
        given, there = self.config.model.num_classes, self.index.num_classes
        if given is not None and given < there:
            raise UserError(
                f"num_classes is {given}, and {self.config.data.root} has {count(there, 'class')}; give at least that"
            )
        return there if given is None else given

    @property
    def num_samples(self) -> int:
        return self.plan.samples

    @property
    def unreadable(self) -> dict[str, str]:
        """File -> reason, of the samples that this rank could not read so far and replaced."""
        stream = self._reader.stream
        return {} if stream is None else {stream.source.describe(key): why for key, why in stream.unreadable.items()}

    @property
    def current_epoch(self) -> int:
        """The epoch of the next batch."""
        return self.plan.epochs_done(self.step)

    def __len__(self) -> int:
        """Batches of the current epoch, from its beginning. Epochs may differ by one."""
        return len(self._steps_of(self.current_epoch))

    def steps(self, epochs: int) -> int:
        """Batches of the first `epochs` epochs together, e.g. for a learning rate's schedule."""
        return self.plan.epoch_end(epochs)

    def _steps_of(self, epoch: int) -> range:
        return range(self.plan.epoch_end(epoch), self.plan.epoch_end(epoch + 1))

    def digest(self, step: int) -> str:
        """The digest (hex) of the planned global batch of a step: ids, crops, flips, augmentation and mixing, as in the
        ledger of a run; the same on any number of ranks. step: 0 is the first."""
        ids, *_ = self.plan.samples_at(step, 0, self.plan.global_batch_size)
        return self.plan.digest(step, ids)

    # --- the batches

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch (0: the first).

        After `load_state_dict` those that were already yielded are left out, so an epoch that was finished before is
        empty, and the loop `for epoch in range(epochs)` needs no change to resume. One iterator can be read at a time.
        """
        steps = self._steps_of(self._checked_epoch(epoch))
        return self._batches(max(steps.start, self._resumed_at), steps.stop)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The rest of the current epoch. When that is finished, the next call gives the next epoch."""
        return self._batches(self.step, self._steps_of(self.current_epoch).stop)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration over the loader be over this epoch; right after `load_state_dict` over the rest of it.
        Not needed: iterations go on from epoch to epoch by themselves."""
        steps = self._steps_of(self._checked_epoch(epoch))
        self.step = self._resumed_at if self._resumed_at in steps else steps.start

    @staticmethod
    def _checked_epoch(epoch: int) -> int:
        epoch = whole_number("epoch", epoch)
        if epoch < 0:
            raise UserError(f"epoch is {epoch}: give 0 or more")
        return epoch

    def _batches(self, start: int, stop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step, batch in enumerate(self._reader.read(self._open, start, stop), start):
            found = (batch.images, batch.targets) if self.raw else self._finish(batch)
            self.step = step + 1
            yield found

    def _open(self) -> Stream:
        applied = None if self.raw else self.config.augment
        return make_train_stream(self.index, self.plan, self.config.data, self.place, applies=applied)

    # --- saving and resuming

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to resume after the batch that was yielded last: plain numbers and strings."""
        return {
            "format": _FORMAT,
            "step": self.step,
            "data": self.index.fingerprint,
            "settings": self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state` was saved, whatever the number of ranks was then. A setting that was not known when it
        was saved counts as its default.

        Raises UserError if the loader that saved it has other settings or another data set: its steps are others.
        """
        step = state.get("step") if isinstance(state, Mapping) and state.get("format") == _FORMAT else None
        if not isinstance(step, int) or step < 0 or not {"data", "settings"} <= state.keys():
            raise UserError("this is not a state of a TrainLoader; give what its state_dict() returned")
        own = self._settings()
        defaults = semantic_config(RawConfig().resolve())
        known = {name: defaults[name] for name in own if name in defaults} | rename_flat(state["settings"])
        differing = differences(known, own)
        if state["data"] != self.index.fingerprint:
            differing.append("the images are others")
        if differing:
            raise UserError(
                f"the state is of other batches: {'; '.join(differing[:3])}. Make the loader as it was, or start over"
            )
        self.step = self._resumed_at = step

    def _settings(self) -> dict[str, Any]:
        """All that the batches follow from, by flat names."""
        c = self.config
        data = {name: value for name, value in semantic_config(c.data, "data.").items() if ".val_" not in name}
        train = {"train.global_batch_size": c.train.global_batch_size, "train.seed": c.train.seed}
        return data | semantic_config(c.augment, "augment.") | train


def _policy(name: str) -> Literal["none", "randaugment", "randaugment-timm", "trivialaugment", "autoaugment"]:
    """The policy of this name; `make_config` refuses an unknown one."""
    return name  # type: ignore[return-value]
