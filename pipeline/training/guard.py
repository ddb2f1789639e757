"""Numbers that are none: a loss that is not finite must not reach a checkpoint."""

import math

from pipeline.errors import BrokenError


def check_finite(step: int, loss: float, grad_norm: float, precision: str) -> None:
    """Raises BrokenError for a loss that is NaN or infinite, or such a gradient (which fp16's scaler skips itself)."""
    if not math.isfinite(loss) or (precision != "fp16" and not math.isfinite(grad_norm)):
        raise BrokenError(
            f"step {step}: the loss is {loss}, the gradient's norm {grad_norm}; nothing was saved since. "
            "Lower --optim.lr, lengthen --schedule.warmup_epochs, or use --train.precision bf16",
            alike=True,
        )
