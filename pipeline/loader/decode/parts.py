"""Decoding of restart shards on a CPU: the part of a JPEG that holds the window, by libjpeg-turbo, then resized.

The parts come cut (`dataset/shards/restart.py`), so there is nothing for DALI to leave out: `torchvision.io` decodes
them as they are, and the thread that decodes a window resizes it, too. The pixels are those of the other decoders. What
is no JPEG, or fails here, PIL decodes.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from pipeline.dataset.index.pixels import open_image, to_rgb
from pipeline.loader.decode.resize import Resizer, Resizing
from pipeline.loader.stream import EncodedBatch, UndecodableSample

_JPEG = b"\xff\xd8"
_RGB = 3  # of torchvision.io.ImageReadMode


def decodes_as_pil() -> bool:
    """Has the installed torchvision a JPEG decoder, and one that gives PIL's pixels? Another library than libjpeg-turbo
    may interpolate chroma another way."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    for mode, options in (("RGB", {"subsampling": "4:2:0"}), ("RGB", {"subsampling": "4:2:2"}), ("L", {})):
        stream = BytesIO()
        Image.fromarray(pixels).convert(mode).save(stream, "JPEG", **options)
        try:
            found = _decode_jpeg(np.frombuffer(bytearray(stream.getvalue()), np.uint8))
        except (ImportError, AttributeError, RuntimeError):
            return False
        with Image.open(stream) as image:
            if not np.array_equal(found.numpy(), np.asarray(image.convert("RGB"))):
                return False
    return True


def _decode_jpeg(data: np.ndarray) -> torch.Tensor:
    """A JPEG as uint8 [h, w, 3]."""
    import torchvision.io  # noqa: F401 - registers the operator, called without its checks

    if not data.flags.writeable:  # a sample as a whole; torch warns of memory that is not to be written
        data = data.copy()
    return torch.ops.image.decode_jpeg(torch.from_numpy(data), _RGB, False).permute(1, 2, 0)


def _decode(data: np.ndarray) -> torch.Tensor:
    """Any sample as uint8 [h, w, 3]. Raises OSError, ValueError or SyntaxError."""
    if bytes(data[:2]) == _JPEG:
        try:
            return _decode_jpeg(data)
        except RuntimeError:
            pass  # CMYK, or damaged: as PIL finds it
    with open_image(data.data) as opened:
        return torch.from_numpy(np.array(to_rgb(opened)))


class _Windows:
    """The windows of a batch, each decoded when it is taken."""

    def __init__(self, encoded: EncodedBatch):
        self.encoded, self.boxes = encoded, encoded.windows().tolist()

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, position: int) -> torch.Tensor:
        left, top, width, height = self.boxes[position]
        try:
            image = _decode(self.encoded.data[position])
        except (OSError, ValueError, SyntaxError) as error:
            raise UndecodableSample(self.encoded.step, position, f"{type(error).__name__}: {error}") from error
        return image[top : top + height, left : left + width]


class PartDecoder:
    """Decodes and resizes with `threads` threads, `prefetch` batches ahead; delivers on the CPU.

    interpolation: "bilinear" or "bicubic". The size of the output comes with each batch.
    """

    takes_parts = True

    def __init__(self, threads: int, prefetch: int = 2, interpolation: str = "bilinear"):
        self.prefetch = prefetch
        self.resizer = Resizer(threads, interpolation)

    def prepare(self, data: np.ndarray) -> np.ndarray:
        """The bytes as they are."""
        return data

    def rescue(self, data: np.ndarray) -> None:
        """PIL has been asked already."""

    def decode(self, batches: Iterable[EncodedBatch]) -> Iterator[torch.Tensor]:
        """Images uint8 [B, H, W, 3] of each batch, in order. Raises UndecodableSample."""
        pending: deque[Resizing] = deque()
        for encoded in batches:
            pending.append(self.resizer.start(_Windows(encoded), encoded.planned))
            if len(pending) > self.prefetch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def close(self) -> None:
        self.resizer.close()
