"""From a configuration to the two streams of a run: training and validation."""

import dataclasses

import numpy as np
import torch

from pipeline.config import Config, ResolvedDataConfig
from pipeline.config.augment import UNAUGMENTED, AugmentConfig
from pipeline.dataset.index.index import Index
from pipeline.dataset.index.left_out import count_images
from pipeline.errors import UserError
from pipeline.limits import available_cores
from pipeline.loader.eval_plan import EvalPlan, FiveCropPlan
from pipeline.loader.plan import TrainPlan
from pipeline.loader.source import Source
from pipeline.loader.stream import Decoder, Stream
from pipeline.rank_info import RankInfo


def dali_problem() -> str | None:
    """Why DALI can't be used here, or None."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        return str(error)
    return None


def choose_loader(name: str) -> tuple[str, str | None]:
    """("dali" or "reference", what it fell back from). Raises UserError where DALI is asked for and is not there."""
    if name == "reference":
        return name, None
    problem = dali_problem()
    if problem is None:
        return "dali", None
    if name == "dali":
        raise UserError(f"--data.loader dali: DALI can't be imported ({problem}); install it or give 'reference'")
    return "reference", f"DALI can't be imported ({problem}): decoding with PIL, which is slower"


def cores_of(place: RankInfo) -> int:
    """The cores that this rank may fill with threads, at least 1."""
    bound = getattr(place, "cores", 0)  # other programs describe a rank by fewer fields
    return bound or max(1, available_cores() // place.local_size)


def check_shares(config: Config, world_size: int) -> None:
    """Raises UserError if the ranks can't share the global batch equally, or if that splits a mixing group."""
    size, group = config.train.global_batch_size, config.augment.mix_group
    if size % world_size:
        least = group if config.augment.mixes else 1  # images of a rank
        multiple = -(-size // (world_size * least)) * world_size * least
        fewer = next(ranks for ranks in range(world_size, 0, -1) if size % (ranks * least) == 0)
        raise UserError(
            f"--train.global_batch_size {size} is not divisible by the {world_size} ranks; "
            f"give a multiple, e.g. {multiple}, or fewer ranks, e.g. {fewer}"
        )
    local = config.train.local_batch_size(world_size)
    if config.augment.mixes and local % group:
        raise UserError(
            f"--augment.mix_group {group} does not divide the {local} images that each of {world_size} ranks has of "
            f"--train.global_batch_size {size}; give a divisor of {local}, or another number of ranks"
        )


def check_decode(data: ResolvedDataConfig, device_type: str) -> None:
    """Raises UserError where images can't be decoded the way that is asked for."""
    if data.decode == "mixed" and device_type != "cuda":
        raise UserError("--data.decode mixed decodes on a GPU, and this is a CPU; give --data.decode cpu")
    if data.decode == "mixed" and choose_loader(data.loader)[0] != "dali":
        raise UserError("--data.decode mixed is DALI's; install it and give --data.loader dali, or --data.decode cpu")


def describe_augment(augment: AugmentConfig) -> str:
    """The settings that differ from the defaults, as options are written: "policy randaugment, mixup 0.2"."""
    pairs = ((item.name, getattr(augment, item.name), item.default) for item in dataclasses.fields(augment))
    return ", ".join(f"{name} {value}" for name, value, default in pairs if value != default) or "nothing"


def make_decoder(
    name: str,
    batch_size: int,
    threads: int,
    device: torch.device,
    prefetch: int,
    resize: int | None = None,
    interpolation: str = "bilinear",
    decode: str = "cpu",
) -> Decoder:
    """A decoder by name, "dali" or "reference". resize: of the shorter side in validation, None in training. decode: as
    `data.decode`."""
    if name == "dali":
        from pipeline.loader.decode.dali import DaliDecoder

        return DaliDecoder(batch_size, threads, device, prefetch, interpolation, decode)
    from pipeline.loader.decode.reference import ReferenceDecoder

    return ReferenceDecoder(threads, prefetch, resize, interpolation)


def make_train_stream(
    index: Index, plan: TrainPlan, data: ResolvedDataConfig, place: RankInfo, applies: AugmentConfig | None = None
) -> Stream:
    """The training batches of a rank: images cropped and flipped, and beside them what is to be done to them.

    applies: the augmentation that the caller applies to each batch, by `Batch.augmented`, `apply_erase_mix` and
    `soft_targets`. Raises UserError where the plan has another one: its digests would tell of an augmentation that no
    pixel has seen. `TrainLoader` applies all of it.
    """
    padded = [] if plan.pad_crop is None else [f"pad_crop {plan.pad_crop}"]
    if (plan.augment.draws or plan.augment.mixes or padded) and applies != plan.augment:
        drawn = [] if padded and plan.augment == UNAUGMENTED else [describe_augment(plan.augment)]
        raise UserError(
            f"the plan augments ({', '.join(padded + drawn)}), and its reader does not apply that: "
            "use pipeline.TrainLoader, or apply batch.augmented() and batch.erase_mix and give applies=plan.augment"
        )
    return _make_stream(index, "train", plan, data, plan.global_batch_size // place.size, place)


def make_eval_stream(
    index: Index,
    data: ResolvedDataConfig,
    batch_size: int,
    place: RankInfo,
    crops: bool = False,
    labels: np.ndarray | None = None,
) -> Stream:
    """The validation batches of a rank, at most `batch_size` images each.

    crops: five of each image (`FiveCropPlan`), in whole images and at least one. labels: int [n], instead of the
    index's.
    """
    records = index.splits["val"].records
    widths, heights = (np.ascontiguousarray(records[key], np.int64) for key in ("width", "height"))
    if crops:
        batch_size = FiveCropPlan.CROPS * max(1, batch_size // FiveCropPlan.CROPS)
    kind = FiveCropPlan if crops else EvalPlan
    support = 2 if data.interpolation == "bicubic" else 1
    plan = kind(widths, heights, batch_size, data.val_resize, data.val_size, support)
    stream = _make_stream(index, "val", plan, data, batch_size, place)
    stream.missing = count_images(index.left_out, "val")
    if labels is not None:
        stream.labels = np.ascontiguousarray(labels, np.int64)
    return stream


def _make_stream(
    index: Index, name: str, plan: TrainPlan | EvalPlan, data: ResolvedDataConfig, batch_size: int, place: RankInfo
) -> Stream:
    split = index.splits[name]
    threads = data.threads or cores_of(place)
    name_of_loader, _ = choose_loader(data.loader)
    resize = data.val_resize if name == "val" else None
    check_decode(data, place.device.type)
    settings = (batch_size, threads, place.device, data.prefetch, resize, data.interpolation, data.decode)
    decoder = make_decoder(name_of_loader, *settings)
    labels = split.records["label"]
    source = Source(split)
    return Stream(
        plan, source, decoder, labels, place.rank, place.size, place.device, data.prefetch, data.max_unreadable
    )
