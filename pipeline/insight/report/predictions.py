"""Predictions of a trained network for validation images: by class, confusions, and the most confident mistakes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.config import Config
from pipeline.dataset.index.index import Index
from pipeline.limits import available_cores
from pipeline.loader.decode.reference import decode_sample
from pipeline.training.step import autocast

BATCH = 64


@dataclass(frozen=True)
class Predictions:
    """Predictions for n validation images.

    Attributes:
        ids: int64 [n], positions in the index.
        labels: int64 [n], the true classes.
        predicted: int64 [n], the predicted classes.
        confidence: float [n], probability of the predicted class.
        unreadable: number of images that could not be read.
        total: size of the split that the n images were taken from.
    """

    ids: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    unreadable: int
    total: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float((self.labels == self.predicted).mean())

    def by_class(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """(top-1 in percent, images) of each class, [classes]; NaN without images."""
        count = np.bincount(self.labels, minlength=classes)
        correct = np.bincount(self.labels[self.labels == self.predicted], minlength=classes)
        with np.errstate(invalid="ignore"):
            return 100 * correct / count, count

    def confusions(self, most: int) -> list[tuple[int, int, int]]:
        """(label, predicted class, images), the most frequent first."""
        wrong = self.labels != self.predicted
        pairs, counts = np.unique(np.stack([self.labels[wrong], self.predicted[wrong]]), axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]

    def mistakes(self, most: int) -> np.ndarray:
        """Positions in these arrays of the wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:most]


def spread(total: int, most: int | None) -> np.ndarray:
    """`most` positions of 0 ... total - 1, evenly spread; all of them for None."""
    if most is None or most >= total:
        return np.arange(total)
    return np.unique(np.linspace(0, total - 1, most).round().astype(np.int64))


def load_image(index: Index, config: Config, sample: int) -> np.ndarray | None:
    """A validation image as the network sees it, uint8 [size, size, 3]; None if it can't be read."""
    try:
        data = np.frombuffer(index.splits["val"].read(sample), np.uint8)
        return decode_sample(
            data, None, False, config.data.val_size, config.data.val_resize, None, config.data.interpolation
        )
    except (OSError, ValueError, SyntaxError):
        return None


def predict(
    network: nn.Module,
    index: Index,
    config: Config,
    device: torch.device,
    most: int | None,
    outputs: np.ndarray,
    precision: str | None = None,
) -> Predictions:
    """Classify validation images, evenly spread over the classes, with `network` (uint8 images in, logits out).

    outputs: the network's output for each class of the index, int64 [n]; labels and predicted classes are outputs.
    precision: of the network's arithmetic; None: as in the run.
    """
    split = index.splits["val"]
    chosen = spread(len(split), most)
    ids: list[int] = []
    predicted: list[np.ndarray] = []
    confidence: list[np.ndarray] = []
    unreadable = 0
    with ThreadPoolExecutor(available_cores()) as pool, torch.inference_mode():
        for first in range(0, len(chosen), BATCH):
            samples = chosen[first : first + BATCH].tolist()
            images = list(pool.map(lambda sample: load_image(index, config, sample), samples))
            good = [(sample, image) for sample, image in zip(samples, images, strict=True) if image is not None]
            unreadable += len(samples) - len(good)
            if not good:
                continue
            batch = torch.from_numpy(np.stack([image for _, image in good])).to(device)
            with autocast(device, precision or config.train.precision):
                logits = network(batch)
            best = logits.float().softmax(1).max(1)
            ids += [sample for sample, _ in good]
            predicted.append(best.indices.cpu().numpy())
            confidence.append(best.values.cpu().numpy())
    positions = np.array(ids, np.int64)
    labels = outputs[split.records["label"][positions]].astype(np.int64)
    empty = np.zeros(0)
    return Predictions(
        positions,
        labels,
        np.concatenate(predicted) if predicted else empty.astype(np.int64),
        np.concatenate(confidence) if confidence else empty,
        unreadable,
        len(split),
    )
