"""The rules of what can be trained. `train` and `preflight` both ask here, so that they give the same answer.

What a single option may be is checked by `pipeline.config`. The rules here also depend on the number of ranks, the
device, the network or the data set.
"""

from collections.abc import Iterator, Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import Config, ModelConfig
from pipeline.config.networks import is_torchvision
from pipeline.counts import count
from pipeline.errors import UserError
from pipeline.loader.build import check_decode, check_shares
from pipeline.model.build import build_model
from pipeline.model.meta_init import meta_init
from pipeline.model.sizes import check_image_sizes, check_smallest_piece
from pipeline.tracking.tensorboard_view import check_installed
from pipeline.training.optim.own import check_loss, check_optimizer


def validate(config: Config, world_size: int, device_type: str, data_classes: int | None = None) -> None:
    """Raises UserError, in one line, for the first reason why this run can't be trained.

    Nothing is opened, allocated or computed.

    Args:
        config: the run.
        world_size: number of ranks.
        device_type: "cuda" or "cpu": what the ranks compute with.
        data_classes: number of classes of the data set; None: not known yet (`check_classes` and
            `check_loss` follow).
    """
    check_shares(config, world_size)
    if config.tracking.tensorboard:
        check_installed()
    check_decode(config.data, device_type)
    check_network(config, world_size, device_type)
    check_loss(config, config.model.num_classes or data_classes)
    check_optimizer(config.optim)
    if data_classes is not None:
        check_classes(config.model, data_classes)


def check_network(config: Config, world_size: int, device_type: str) -> None:
    """Raises UserError if the network can't be built, or can't be trained on these images, this many at a time, on this
    type of device."""
    check_image_sizes(config)
    check_smallest_piece(config, world_size)
    if config.model.sync_batchnorm and device_type == "cpu":
        raise UserError(
            "--model.sync_batchnorm requires GPUs (PyTorch has no SyncBatchNorm for CPUs); "
            "give --model.sync_batchnorm false"
        )
    try:
        with meta_init():
            model = build_model(config.model, config.model.num_classes or 1000)
    except RuntimeError:
        if is_torchvision(config.model.name):
            raise
        model = build_model(config.model, config.model.num_classes or 1000)  # one that reads its own values
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"--model.name {config.model.name} has no parameter that requires a gradient, so nothing is trained; leave "
            "some, or freeze parts with --model.freeze"
        )
    if config.evaluation.recalibrate_batches and not any(isinstance(m, _BatchNorm) for m in model.modules()):
        raise UserError(
            f"--evaluation.recalibrate_batches {config.evaluation.recalibrate_batches}: {config.model.name} has no "
            "BatchNorm; give 0"
        )


def check_classes(model: ModelConfig, data_classes: int) -> None:
    """Raises UserError if the network has fewer outputs than the data set has classes."""
    if model.num_classes is not None and model.num_classes < data_classes:
        raise UserError(
            f"--model.num_classes {model.num_classes}: the data set has {count(data_classes, 'class')}; "
            "give at least that"
        )


def data_warnings(images: int, global_batch_size: int, data_classes: int, unscored: Sequence[str]) -> Iterator[str]:
    """A line for each thing in which a data set that can be trained on is probably not what is meant.

    Args:
        images: for training.
        global_batch_size: of the run.
        data_classes: number of classes of the data set.
        unscored: names of those without a validation image.
    """
    if images < global_batch_size:
        yield (
            f"the data set has {count(images, 'training image')}, fewer than --train.global_batch_size "
            f"{global_batch_size:,}: each step sees every image, some of them again, and an epoch is less than a step; "
            "give a smaller batch"
        )
    if data_classes == 1:
        yield (
            "the data set has one class: all images have the same label, so nothing is learned and top-1 is 100 %; "
            "give a --data.root with a folder for each class"
        )
    if unscored:
        more = f" and {len(unscored) - 3:,} more" if len(unscored) > 3 else ""
        yield (
            f"{len(unscored):,} of {count(data_classes, 'class')} without a validation image "
            f"({', '.join(unscored[:3])}{more}): the scores say nothing about them; put some into the validation folder"
        )


def precision_warning(
    precision: str, device_type: str, remedy: str = "--train.precision fp32 for a new run"
) -> str | None:
    """A line where a precision is much slower on this machine than another: a CPU or a GPU without instructions for it.

    Measured in bf16 on a CPU that has AVX2, without AVX-512: ResNet-18 takes 5 times as long, ResNet-152 20 times.
    """
    if device_type == "cuda" and precision == "bf16" and torch.cuda.is_available():
        slow = not torch.cuda.is_bf16_supported(including_emulation=False)
        return slow_bf16(torch.cuda.get_device_name(), remedy) if slow else None
    if device_type != "cpu" or precision == "fp32":
        return None
    supported = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported}
    if supported[precision]():
        return None
    slower = "it takes 5 to 20 times as long as fp32"
    return f"this CPU has no fast instructions for {precision}: {slower}; give {remedy}"


def slow_bf16(gpu: str, remedy: str = "--train.precision fp32 for a new run") -> str:
    """The same line of a GPU, by its name, whose compute capability is below 8.0 (T4, RTX 20xx)."""
    return f"{gpu} has no instructions for bf16, which torch emulates: slow; give {remedy.replace('fp32', 'fp16')}"
