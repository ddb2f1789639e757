"""How much memory of a GPU a training step takes, estimated on the meta device: nothing is computed or allocated."""

from dataclasses import dataclass

import torch

from pipeline.config import Config
from pipeline.model.build import build_model

MIB = 1 << 20
OVERHEAD_MIB = 2048  # the CUDA context, cuDNN's workspace, NCCL's and DALI's buffers, fragmentation: a round allowance


@dataclass(frozen=True)
class StepMemory:
    """MiB. fixed_mib: weights, gradients, optimizer state; image_mib: of each image, what backward needs."""

    fixed_mib: float
    image_mib: float
    images: int

    @property
    def total_mib(self) -> float:
        return self.fixed_mib + self.image_mib * self.images + OVERHEAD_MIB


def estimate_step(config: Config, num_classes: int, images: int) -> StepMemory:
    """The memory of a step over `images` at once.

    What is kept for backward is counted as autograd saves it, for one image more against one image less, in the
    precision's element type. torch.compile needs less; a larger evaluation batch is not looked at.
    """
    with torch.device("meta"):
        model = build_model(config.model, num_classes)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers())
    states = 1 if config.optim.name == "sgd" else 2  # momentum; Adam's two moments
    half = config.train.precision != "fp32"
    fixed = 4 * (parameters * (2 + states) + buffers) + (2 * parameters if half else 0)  # + autocast's copies
    if half:
        model = model.to(torch.bfloat16)
    saved = [_saved_bytes(model, count, config.data.image_size) for count in (2, 4)]
    return StepMemory(fixed / MIB, (saved[1] - saved[0]) / 2 / MIB, images)


def _saved_bytes(model: torch.nn.Module, images: int, size: int) -> int:
    """Bytes that autograd keeps between forward and backward; a storage kept twice counts once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    kind = next(model.parameters()).dtype
    batch = torch.empty(images, 3, size, size, dtype=kind, device="meta")
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch).float().log_softmax(1).sum()
    return sum(storage.nbytes() for storage in storages.values())
