"""The group `train`: batch, precision, length of a run."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Check, at_most, positive, runtime_field

MOST_IMAGES = 1 << 20  #: of a batch; ImageNet has 1.28 million for training
Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class TrainConfig:
    """Batch, precision, length."""

    global_batch_size: int = 256
    """Images per step, over all ranks; it stays the same when the number of ranks changes."""
    micro_batch_size: int | None = runtime_field(None)
    """Images that a rank puts through the network at once; the local batch is accumulated from as many as it
    takes. BatchNorm's statistics are over these. Default: the local batch at once."""
    eval_batch_size: int | None = runtime_field(None)
    """Validation images per rank at once; default: the micro batch."""
    eval_every_epochs: float = runtime_field(1.0)
    """Evaluate whenever this many epochs are done, and at the end."""
    precision: Precision = "bf16"
    """Data type of the network's arithmetic: bf16 and fp16 by autocast; weights stay fp32."""
    channels_last: bool = runtime_field(True)
    """Memory format NHWC for images and weights."""
    compile: bool = runtime_field(False)
    """torch.compile the model."""
    compile_cache: str | None = runtime_field(None)
    """Folder for what torch.compile has made, for the next start; default: compile_cache in the run folder. What
    TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR say takes precedence."""
    cuda_graphs: bool = runtime_field(False)
    """With compile, on CUDA: record the step's kernels as graphs and replay them."""
    bucket_mb: float = runtime_field(25.0)
    """MiB of gradients that are exchanged at once during the backward pass. With more than two ranks the order
    of sums follows from it."""
    compress_gradients: Literal["bf16"] | None = None
    """Exchange gradients in this type, half the bytes; default: as they are."""
    profile_steps: int | None = runtime_field(None)
    """Profile this many steps, after the first three of a start: a trace, and on CUDA a snapshot of the memory, in
    run_dir/profile."""
    seed: int = 0
    """Determines initial weights, order of the samples and augmentation."""
    max_steps: int | None = runtime_field(None)
    """Stop after this many steps in all, in the middle of the schedule; default: to its end."""
    stop_after_evals_without_gain: int | None = runtime_field(None)
    """Early stopping: end the run, as finished, after this many evaluations in a row without a higher top-1 (of the
    weights or their average); default: train to the end."""
    device: Literal["auto", "cuda", "cpu"] = runtime_field("auto")
    """Where to train; auto: on the GPUs, or on the CPU of a machine without any."""
    hang_timeout_s: float = runtime_field(600.0)
    """Seconds without progress after which a rank counts as hung: it is named, and the job ends for a restart."""
    deterministic: bool = runtime_field(False)
    """On CUDA: only deterministic kernels (slower), so that resuming is bit-exact there too. On CPU it is always."""

    def local_batch_size(self, world_size: int) -> int:
        """Images of a step that one of `world_size` ranks trains on."""
        return max(1, self.global_batch_size // world_size)

    def local_micro_batch_size(self, world_size: int) -> int:
        """Images that a rank puts through the network at once: at most the local batch."""
        local = self.local_batch_size(world_size)
        return min(self.micro_batch_size or local, local)

    def local_eval_batch_size(self, world_size: int) -> int:
        """Validation images that a rank scores at once."""
        return self.eval_batch_size or self.local_micro_batch_size(world_size)


def check_train(c: TrainConfig) -> Iterator[Check]:
    """Impossible values of the group `train`."""
    yield at_most("train.global_batch_size", c.global_batch_size, MOST_IMAGES, "ImageNet has 1.28 million images")
    yield positive("train.micro_batch_size", c.micro_batch_size, optional=True)
    yield at_most("train.eval_batch_size", c.eval_batch_size, MOST_IMAGES, "of a rank, all in memory", optional=True)
    yield positive("train.eval_every_epochs", c.eval_every_epochs)
    yield positive("train.max_steps", c.max_steps, optional=True)
    yield positive("train.stop_after_evals_without_gain", c.stop_after_evals_without_gain, optional=True)
    yield "train.cuda_graphs", c.cuda_graphs, c.compile or not c.cuda_graphs, "give train.compile, too"
    yield positive("train.bucket_mb", c.bucket_mb)
    yield positive("train.profile_steps", c.profile_steps, optional=True)
    yield positive("train.hang_timeout_s", c.hang_timeout_s)
    yield "train.seed", c.seed, 0 <= c.seed < 2**63, "give a whole number from 0 to 2^63 - 1"
