"""Make an image smaller, or save what can be seen of a damaged one; the same input gives the same bytes."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile

from pipeline.dataset.index.pixels import narrow, open_image


@contextmanager
def _tolerant(tolerant: bool) -> Iterator[None]:
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, tolerant
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def reencode(data: bytes, short_side: int | None, quality: int, damaged: bool = False) -> tuple[bytes, int, int]:
    """(JPEG bytes, width, height) of an image, its shorter side reduced to `short_side` pixels (None: kept).

    Shrinking is by Lanczos. Grayscale stays grayscale, all else becomes RGB. The pixels are taken as stored and the
    EXIF note is dropped, so that every reader sees what ImageFolder sees. `damaged`: missing parts become gray
    instead of an error. Not for several threads at once. Raises OSError or ValueError where there is nothing to decode.
    """
    with warnings.catch_warnings(), _tolerant(damaged):
        warnings.simplefilter("ignore", UserWarning)
        try:
            with open_image(data) as opened:
                image = narrow(opened)
                image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
        except (SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(str(error)) from error
    width, height = image.size
    if short_side is not None and min(width, height) > short_side:
        scale = short_side / min(width, height)
        width, height = (short_side if side == min(image.size) else round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue(), width, height
