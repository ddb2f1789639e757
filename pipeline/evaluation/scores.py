"""The scores of networks: printed, as JSON, and class by class as CSV."""

import csv
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.evaluation.checkpoints import ScoredNetwork
from pipeline.evaluation.partial_sums import PartialSums
from pipeline.logs import logger
from pipeline.model.published import Published
from pipeline.tracking.eval_rows import scored_images
from pipeline.training.evaluate import Evaluation
from pipeline.training.recorder import NAMED


@dataclass(frozen=True)
class Result:
    """One network at one size. seconds: that it took. folders: (class folder, its words, its output). kept: the partial
    sums in the run folder."""

    weights: str
    size: int
    resize: int
    evaluation: Evaluation
    seconds: float
    folders: list[tuple[str, str, int]]
    kept: PartialSums | None = None

    @property
    def facts(self) -> dict:
        scores = self.evaluation.scores
        named = {"weights": self.weights, "size": self.size, "resize": self.resize, **dataclasses.asdict(scores)}
        if self.evaluation.among is not None:  # only the data set's own classes compete
            own = self.evaluation.among.scores
            named |= {"own_classes": len(self.folders), "own_top1": own.val_top1, "own_top5": own.val_top5}
        return named | {
            "images_per_s": round(scores.images / self.seconds, 1),
            "unreadable": self.evaluation.unreadable,
        }


def print_scores(
    results: list[Result],
    subject: ScoredNetwork,
    published: Published | None,
    json_file: str | None,
    per_class: str | None,
) -> None:
    """Print the scores, and write them where that was asked for."""
    where = {"checkpoint": str(subject.path), "step": subject.meta["step"]} if subject.path else {}
    facts = where | results[0].facts
    shown = "left_out", "unreadable"  # said in words below
    if published is not None:
        facts |= {"published_top1": published.top1, "published_top5": published.top5}
    if len(results) == 1:
        lines = [
            (name, f"{value:.4f}" if isinstance(value, float) else value)
            for name, value in facts.items()
            if name not in shown
        ]
        for name, value in lines:
            logger.info(f"  {name:<13} {value}")
    else:
        for name, value in where.items():
            logger.info(f"  {name:<13} {value}")
        names = f"{'loss':>8} {'top-1':>8} {'top-5':>8} {'ECE':>7} {'images':>9}"
        logger.info(f"  {'weights':<14} {'size':>5} {'resize':>7} {names}")
        for row in (result.facts for result in results):
            scores = f"{row['val_loss']:8.4f} {row['val_top1']:8.3f} {row['val_top5']:8.3f} {row['val_ece']:7.3f}"
            logger.info(f"  {row['weights']:<14} {row['size']:5} {row['resize']:7} {scores} {row['images']:9,}")
    for line in _left_out_lines(results[0]):
        logger.warning(line)
    try:
        if json_file:
            everything = facts | {"results": [result.facts for result in results]}
            Path(json_file).expanduser().write_text(json.dumps(everything, indent=1) + "\n")
        if per_class:
            write_per_class(Path(per_class).expanduser(), results)
    except OSError as error:
        raise UserError(f"{error.filename} can't be written ({error.strerror}); give another file") from error


def _left_out_lines(result: Result) -> list[str]:
    """What the scores are not of: how many, and the names of those that can't be read now."""
    scores, unreadable = result.evaluation.scores, result.evaluation.unreadable
    if not scores.left_out:
        return []
    lines = [f"the scores are of {scored_images(dataclasses.asdict(scores))}: they can't be read"]
    if result.evaluation.missing:
        lines[0] += f" ({result.evaluation.missing:,} of them when the data set was indexed)"
    lines += [f"{name} can't be read ({reason})" for name, reason in list(unreadable.items())[:NAMED]]
    if len(unreadable) > NAMED:
        lines.append(f"and {len(unreadable) - NAMED:,} more; --json FILE names all")
    return lines


def write_per_class(path: Path, results: list[Result]) -> None:
    """A CSV with a row for each class of each result: class, words, images, top-1 and top-5 in percent."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["weights", "size", "class", "words", "images", "top1", "top5"])
        for result in results:
            for folder, words, output in result.folders:
                images, top1, top5 = result.evaluation.classes[output].tolist()
                shares = [round(100 * hits / images, 4) if images else "" for hits in (top1, top5)]
                rows.writerow([result.weights, result.size, folder, words, int(images), *shares])
