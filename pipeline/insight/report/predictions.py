"""What a trained network says of validation images: per class, its confusions, and its most confident mistakes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.config import Config
from pipeline.dataset.index.index import Index
from pipeline.loader.build import cores_per_rank
from pipeline.loader.reference import decode_sample
from pipeline.training.step import autocast

BATCH = 64


@dataclass(frozen=True)
class Predictions:
    """Of n validation images: ids int64 [n] (positions in the index), labels, guesses int64 [n], sure: the guess's
    probability [n]. unreadable: images left out. whole: of how many these are a sample."""

    ids: np.ndarray
    labels: np.ndarray
    guesses: np.ndarray
    sure: np.ndarray
    unreadable: int
    whole: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * float((self.labels == self.guesses).mean())

    def by_class(self, classes: int) -> tuple[np.ndarray, np.ndarray]:
        """(percent right, images) of each class, [classes]; NaN without images."""
        count = np.bincount(self.labels, minlength=classes)
        right = np.bincount(self.labels[self.labels == self.guesses], minlength=classes)
        with np.errstate(invalid="ignore"):
            return 100 * right / count, count

    def confusions(self, most: int) -> list[tuple[int, int, int]]:
        """(label, guess, images), the most frequent first."""
        wrong = self.labels != self.guesses
        pairs, counts = np.unique(np.stack([self.labels[wrong], self.guesses[wrong]]), axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        return [(int(pairs[0, i]), int(pairs[1, i]), int(counts[i])) for i in order]

    def mistakes(self, most: int) -> np.ndarray:
        """Positions in these arrays of the wrong guesses, the surest first."""
        wrong = np.flatnonzero(self.labels != self.guesses)
        return wrong[np.argsort(-self.sure[wrong], kind="stable")][:most]


def spread(whole: int, most: int | None) -> np.ndarray:
    """`most` positions of 0 ... whole - 1, evenly spread; all of them for None."""
    if most is None or most >= whole:
        return np.arange(whole)
    return np.unique(np.linspace(0, whole - 1, most).round().astype(np.int64))


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
    network: nn.Module, index: Index, config: Config, device: torch.device, most: int | None, outputs: np.ndarray
) -> Predictions:
    """Ask `network` (uint8 images in, logits out) about validation images, evenly spread over the classes.

    outputs: the network's output for each class of the index, int64 [n]; labels and guesses are outputs.
    """
    split = index.splits["val"]
    chosen = spread(len(split), most)
    ids, guesses, sure, unreadable = [], [], [], 0
    with ThreadPoolExecutor(cores_per_rank(1)) as pool, torch.inference_mode():
        for first in range(0, len(chosen), BATCH):
            samples = chosen[first : first + BATCH].tolist()
            images = list(pool.map(lambda sample: load_image(index, config, sample), samples))
            good = [(sample, image) for sample, image in zip(samples, images, strict=True) if image is not None]
            unreadable += len(samples) - len(good)
            if not good:
                continue
            batch = torch.from_numpy(np.stack([image for _, image in good])).to(device)
            with autocast(device, config.train.precision):
                logits = network(batch)
            best = logits.float().softmax(1).max(1)
            ids += [sample for sample, _ in good]
            guesses.append(best.indices.cpu().numpy())
            sure.append(best.values.cpu().numpy())
    places = np.array(ids, np.int64)
    labels = outputs[split.records["label"][places]].astype(np.int64)
    empty = np.zeros(0)
    return Predictions(
        places,
        labels,
        np.concatenate(guesses) if guesses else empty.astype(np.int64),
        np.concatenate(sure) if sure else empty,
        unreadable,
        len(split),
    )
