"""What the rows of evaluations in a ledger say: the better network, the best step, and whether that is the end."""

import math
from collections.abc import Iterable, Sequence

from pipeline.counts import count


def top1_of(row: dict) -> float:
    """Percent that an "eval" row's better network got: the weights, or their average where there is one."""
    return max(row.get("val_top1", -math.inf), row.get("val_ema_top1", -math.inf))


def better_scores(row: dict) -> dict:
    """loss, top1, top5 (percent) of an "eval" row's better network, and `averaged`: is it the weights' average?"""
    averaged = row.get("val_ema_top1", -math.inf) >= row.get("val_top1", -math.inf)
    infix = "ema_" if averaged else ""
    return {
        "averaged": averaged,
        **{name: row.get(f"val_{infix}{name}", math.nan) for name in ("loss", "top1", "top5")},
    }


def scored_images(row: dict) -> str:
    """ "12 images", or "7 images, 5 of 12 left out": how many an "eval" row's scores are of."""
    images, left_out = row.get("images"), row.get("left_out") or 0
    if images is None:
        return "all images"
    return count(images, "image") + (f", {left_out:,} of {images + left_out:,} left out" if left_out else "")


def left_out_note(row: dict) -> str:
    """ " (5 of 12 images left out)" after a score that is not of all images, else nothing."""
    images, left_out = row.get("images") or 0, row.get("left_out") or 0
    return f" ({left_out:,} of {images + left_out:,} images left out)" if left_out else ""


def best_step(evaluations: Iterable[dict]) -> int | None:
    """The step with the highest `top1_of` among "eval" rows, the earliest of equals; None without any."""
    best = max(evaluations, key=lambda row: (top1_of(row), -row["step"]), default=None)
    return None if best is None else best["step"]


def evals_without_gain(evaluations: Sequence[dict]) -> int:
    """How many "eval" rows there are since the best one, in their order."""
    best = best_step(evaluations)
    return sum(row["step"] > best for row in evaluations) if best is not None else 0


def early_stop(evaluations: Sequence[dict], patience: int | None) -> str | None:
    """Why a run with these "eval" rows ends before its last step; None: it goes on. A function of the rows alone, so
    that a resumed run ends at the same step. patience: `train.stop_after_evals_without_gain`."""
    if patience is None or evals_without_gain(evaluations) < patience:
        return None
    best = best_step(evaluations)
    score = next(top1_of(row) for row in evaluations if row["step"] == best)
    return f"stopped early: {count(patience, 'evaluation')} without a top-1 above the {score:.2f} % of step {best:,}"
