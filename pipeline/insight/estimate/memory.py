"""Memory of a training step on a GPU, from traces of the step."""

from dataclasses import dataclass

from torch import nn

from pipeline.config import Config
from pipeline.insight.estimate.trace import Tracer
from pipeline.training.optim.optimizer import values_per_parameter

MIB = 1 << 20
CONTEXT_MIB = 1500.0  # the CUDA context, and the libraries' code and workspaces
SLACK = 0.08  # what the caching allocator holds above what tensors take
# Both are fitted to ten measurements of one card (RTX A6000, ResNet-152, fp32), which they meet within 8 %.
RESERVE = 0.05  # of the card, that the largest batch leaves free: for fragmentation, and what a driver takes
# What a run has beside its step is assumed, not measured: such parts warn, and nothing fails for them.
NCCL_MIB = 400.0  # of several ranks: 4 MiB a channel and protocol, for up to 32 channels (NCCL_BUFFSIZE), and its own
CUDNN_MIB = 256.0  # the largest workspace that a convolution's fastest algorithm takes beside the context's share
GRAPHS = 0.1  # of what a step allocates: replayed graphs share no memory with what runs beside them
_WINDOW_MIB = 0.33  # of a training image that DALI brings to the GPU: 110,000 pixels at ImageNet's sizes
STATE_COPY = "copy of the state while a checkpoint is saved"


@dataclass(frozen=True)
class StepMemory:
    """A step's memory in MiB.

    weights: with buffers, and their average if there is one; optimizer: its state; kept: for backward, however many
    images (autocast's copies of the weights, BatchNorm's batch statistics); image_mib: for backward, of each image;
    transient_mib: of each image, what is alive beside that at the peak (gradients of activations, the image itself).
    """

    weights_mib: float
    gradients_mib: float
    optimizer_mib: float
    kept_mib: float
    image_mib: float
    transient_mib: float
    images: int

    @property
    def fixed_mib(self) -> float:
        return self.weights_mib + self.gradients_mib + self.optimizer_mib + self.kept_mib

    def allocated_mib(self, images: int) -> float:
        """What tensors take with this many images at once: what torch.cuda.max_memory_allocated counts."""
        return self.fixed_mib + (self.image_mib + self.transient_mib) * images

    def card_mib(self, images: int) -> float:
        """What the card shows as used."""
        return CONTEXT_MIB + (1 + SLACK) * self.allocated_mib(images)

    @property
    def total_mib(self) -> float:
        return self.card_mib(self.images)

    def most_images(self, card_mib: float) -> int:
        """How many images at once fit a card with nothing beside the step; 0 if not even one does."""
        left = (card_mib - CONTEXT_MIB) / (1 + SLACK) - self.fixed_mib
        return max(0, int(left // (self.image_mib + self.transient_mib)))


@dataclass(frozen=True)
class RunMemory:
    """What a run has on the card beside its step, in MiB by name; `loader_image_mib` for each image of the local batch,
    `graphs_share` of what a step allocates. All of it but `STATE_COPY` is assumed."""

    step: StepMemory
    parts: dict[str, float]
    loader_image_mib: float
    graphs_share: float
    local_batch: int

    def by_name(self, images: int) -> dict[str, float]:
        """All of it, with so many images at once."""
        found = dict(self.parts)
        if self.loader_image_mib:
            found["DALI's pool"] = self.loader_image_mib * max(images, self.local_batch)
        if self.graphs_share:
            found["pool of CUDA graphs"] = self.graphs_share * self.step.allocated_mib(images)
        return found

    def card_mib(self, images: int) -> float:
        """What the card shows as used."""
        return self.step.card_mib(images) + sum(self.by_name(images).values())

    def most_images(self, card_mib: float) -> int:
        """How many images at once fit a card and leave `RESERVE` of it free; 0 if not even one does."""
        room, most = (1 - RESERVE) * card_mib, self.step.most_images(card_mib)
        while most > 0 and self.card_mib(most) > room:
            most -= 1
        return most


def run_memory(step: StepMemory, config: Config, world_size: int) -> RunMemory:
    """Of a run on so many GPUs. The host's memory is not in it."""
    parts = {"workspaces of cuDNN": CUDNN_MIB}
    if world_size > 1:
        parts["buffers of NCCL"] = NCCL_MIB
    parts[STATE_COPY] = step.weights_mib + step.optimizer_mib
    loader = 0.0
    if config.data.loader != "reference":  # windows, as they are and resized, in each batch that is decoded ahead
        loader = (config.data.prefetch + 1) * (_WINDOW_MIB + 3 * config.data.image_size**2 / MIB)
    local = config.train.local_batch_size(world_size)
    return RunMemory(step, parts, loader, GRAPHS if config.train.cuda_graphs else 0.0, local)


def estimate_step(config: Config, num_classes: int, images: int) -> StepMemory:
    """The memory of a step over `images` at once; see `step_memory`."""
    return step_memory(Tracer(config, num_classes), images)


def step_memory(tracer: Tracer, images: int) -> StepMemory:
    """The memory of a step over `images` at once, from two traces, whose difference is what one more image adds.

    torch.compile may need less; a larger evaluation batch is not included.
    """
    few, more = tracer.trace(2), tracer.trace(4)
    image, peak = (more.kept - few.kept) / 2, (more.peak - few.peak) / 2
    trained = sum(p.numel() * p.element_size() for p in tracer.model.parameters() if p.requires_grad)
    return StepMemory(
        weights_mib=weight_bytes(tracer.model) * (2 if tracer.config.ema.averages else 1) / MIB,
        gradients_mib=trained / MIB,
        optimizer_mib=values_per_parameter(tracer.config.optim) * trained / MIB,
        kept_mib=(few.kept - 2 * image) / MIB,
        image_mib=image / MIB,
        transient_mib=max(0.0, peak - image) / MIB,
        images=images,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def checkpoint_bytes(model: nn.Module, config: Config) -> int:
    """Bytes of a checkpoint: weights, their average if there is one, and the optimizer's state, in float32."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copies = 2 if config.ema.averages else 1
    return weight_bytes(model) * copies + 4 * trained * values_per_parameter(config.optim)
