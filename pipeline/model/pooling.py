"""A deterministic gradient of adaptive average pooling, which torch does not have on CUDA.

AlexNet, VGG and GoogLeNet's auxiliary heads pool adaptively to several outputs a side. Torch refuses the gradient under
`torch.use_deterministic_algorithms`, since its kernel adds with atomics. Here each input gathers from the outputs that
it went into, in a fixed order; the forward stays torch's own.
"""

import functools
import warnings

import torch

_OPERATOR = "_adaptive_avg_pool2d_backward"


@functools.lru_cache(maxsize=32)
def _windows(inputs: int, outputs: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Along one side: (sizes float32 [outputs], of the windows; sources int64 [K, inputs], the outputs whose window
    holds an input, and used float32 [K, inputs], 0 where there are fewer than K)."""
    starts = [i * inputs // outputs for i in range(outputs)]
    ends = [-(-(i + 1) * inputs // outputs) for i in range(outputs)]
    holders = [[o for o in range(outputs) if starts[o] <= i < ends[o]] for i in range(inputs)]
    most = max(map(len, holders))
    sources = [[own[min(k, len(own) - 1)] for own in holders] for k in range(most)]
    used = [[float(k < len(own)) for own in holders] for k in range(most)]
    sizes = [float(end - start) for start, end in zip(starts, ends, strict=True)]
    return torch.tensor(sizes, device=device), torch.tensor(sources, device=device), torch.tensor(used, device=device)


def _spread(gradient: torch.Tensor, inputs: int, axis: int) -> torch.Tensor:
    """Give each input along `axis` (-1 or -2) the sum over the outputs whose window holds it."""
    _, sources, used = _windows(inputs, gradient.shape[axis], gradient.device)
    total = None
    for source, one in zip(sources, used, strict=True):
        part = gradient.index_select(axis, source)
        if len(sources) > 1:
            part = part * (one if axis == -1 else one[:, None])
        total = part if total is None else total + part
    assert total is not None
    return total


def adaptive_avg_pool2d_backward(gradient: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """The gradient of adaptive average pooling by its input.

    gradient: float [..., h, w], by the output. images: float [..., H, W], the input; of it only shape, dtype and memory
    format count. Returns a tensor like `images`; sums are in float32 (float64 for float64).
    """
    height, width = images.shape[-2:]
    wide = gradient if gradient.dtype == torch.float64 else gradient.float()
    rows, *_ = _windows(height, gradient.shape[-2], gradient.device)
    columns, *_ = _windows(width, gradient.shape[-1], gradient.device)
    shares = wide / rows[:, None] / columns
    return torch.empty_like(images).copy_(_spread(_spread(shares, width, -1), height, -2))


@functools.cache  # torch 2.11 refuses a second replacement
def use_deterministic_pooling(device_type: str = "CUDA") -> torch.library.Library:
    """Let this process compute the gradient that way on such a device ("CUDA" or "CPU"), whichever module or function
    pools. It holds as long as the process, for whatever runs there later."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        library.impl(_OPERATOR, adaptive_avg_pool2d_backward, device_type)
    return library
