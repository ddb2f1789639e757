"""The group `train`: batch, precision, length of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Check, free, positive


@dataclass(frozen=True)
class TrainConfig:
    """Batch, precision, length."""

    global_batch_size: int = 256
    """Images a step over all ranks; stays the same when the number of ranks changes."""
    micro_batch_size: int | None = free(None)
    """Images that a rank puts through the network at once; the local batch is accumulated from as many as it
    takes. BatchNorm's statistics are over these. Default: the local batch at once."""
    eval_batch_size: int | None = free(None)
    """Validation images a rank at once; default: the micro batch."""
    eval_every_epochs: float = free(1.0)
    """Evaluate whenever this many epochs are done, and at the end."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    channels_last: bool = free(True)
    compile: bool = free(False)
    """torch.compile the model."""
    seed: int = 0
    max_steps: int | None = free(None)
    """Stop after this many steps in all, in the midst of the schedule; default: to its end."""
    device: Literal["auto", "cuda", "cpu"] = free("auto")
    deterministic: bool = free(False)
    """On CUDA: only deterministic kernels (slower), so that resuming is bit-exact there too. On CPU it is always."""


def check_train(c: TrainConfig) -> Iterator[Check]:
    """Impossible values of the group `train`."""
    yield positive("train.global_batch_size", c.global_batch_size)
    yield positive("train.micro_batch_size", c.micro_batch_size, optional=True)
    yield positive("train.eval_batch_size", c.eval_batch_size, optional=True)
    yield positive("train.eval_every_epochs", c.eval_every_epochs)
    yield positive("train.max_steps", c.max_steps, optional=True)
    yield "train.seed", c.seed, 0 <= c.seed < 2**63, "give a whole number from 0 to 2^63 - 1"
