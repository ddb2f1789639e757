"""The least GPU-hours that a recipe takes on ImageNet, by the roofline of a GPU."""

import statistics

from pipeline.config import Config
from pipeline.config.time import epochs_of
from pipeline.dataset.imagenet import CLASSES, TRAIN_IMAGES
from pipeline.insight.estimate.gpus import find_card
from pipeline.insight.estimate.trace import Tracer

TRACED_IMAGES = 16  # images of a traced step: enough for the weights' share of the traffic to be small


class GpuHours:
    """Hours of one kind of GPU. Networks that several recipes share are traced once.

    Args:
        card: name of a GPU (h100, a100-80gb, ...).

    Raises:
        UserError: the GPU is not known.
    """

    def __init__(self, card: str):
        self.peak = find_card(card)
        self._image_s: dict[tuple, float] = {}  # seconds of a training image, by network, precision and size

    def image_s(self, config: Config) -> float:
        """Seconds of one training image at `config.data.image_size`: each kernel at the GPU's peak."""
        model, precision = config.model, config.train.precision
        key = model.name, model.blurpool, precision, config.data.image_size
        if key not in self._image_s:
            step = Tracer(config, CLASSES).trace(TRACED_IMAGES)
            seconds = step.seconds(self.peak.half_tflops, self.peak.tflops, self.peak.gb_s)
            self._image_s[key] = seconds / step.images
        return self._image_s[key]

    def of(self, config: Config) -> float:
        """The least hours that training takes on ImageNet, all GPUs together; evaluation is not included.

        Where the image size grows, an epoch's time is scaled with the number of pixels.
        """
        data = config.data
        epochs = epochs_of(config.schedule.epochs, TRAIN_IMAGES / config.train.global_batch_size)
        pixels = [(data.size_at(epoch) / data.image_size) ** 2 for epoch in range(max(1, round(epochs)))]
        return self.image_s(config) * TRAIN_IMAGES * epochs * statistics.fmean(pixels) / 3600
