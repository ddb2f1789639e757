"""Which image files are taken, and what pixels they have: one answer for index, verify, pack and both loaders.

The pixels are those that PIL, and so torchvision's ImageFolder, finds: the first frame, as stored (EXIF is ignored; a
TIFF's own orientation is not), without alpha. 16 bits a channel become 8 by dropping the lower byte, as PIL does it
for color; PIL alone would clip gray ones to white.
"""

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

_RUN_A_PROGRAM = frozenset({"EPS", "WMF"})  # PIL decodes them with Ghostscript or Windows
_WITHOUT_RANGE = frozenset({"I", "F", "I;16S", "I;32S", "LAB", "HSV"})  # no conversion to 8 bits is agreed on
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_ANIMATED_WEBP = 2  # bit of the flags in the chunk VP8X


def open_image(data: bytes | memoryview) -> "Image.Image":
    """An image by PIL, not decoded yet. ValueError for a format that is not taken; else what PIL raises."""
    from PIL import Image

    image = Image.open(BytesIO(data))
    if image.format in _RUN_A_PROGRAM:
        image.close()
        raise ValueError(f"format {image.format} is not supported: convert the file to JPEG or PNG")
    return image


def check_mode(image: "Image.Image") -> None:
    """ValueError for an image that `to_rgb` can't convert."""
    if image.mode in _WITHOUT_RANGE and not _is_16_bit(image):
        raise ValueError(f"pixels of mode {image.mode} ({image.format}) have no fixed range: convert it to 8 bits")


def _is_16_bit(image: "Image.Image") -> bool:
    """Gray of 16 bits; PIL opens such PGM files as 32-bit."""
    return image.mode in ("I;16", "I;16L", "I;16B", "I;16N") or (image.mode == "I" and image.format in ("PPM", "PNG"))


def narrow(image: "Image.Image") -> "Image.Image":
    """An image with 16-bit gray brought to 8 bits, any other as it is. Decodes it; ValueError as `check_mode`."""
    from PIL import Image

    image.load()
    check_mode(image)
    if not _is_16_bit(image):
        return image
    import numpy as np

    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def to_rgb(image: "Image.Image") -> "Image.Image":
    """An image as 8-bit RGB, its first frame. Decodes it: raises what PIL raises, and ValueError as `check_mode`."""
    return narrow(image).convert("RGB")


def dali_agrees(data: memoryview) -> bool:
    """Does DALI's CPU decoder give the pixels of `to_rgb` for this file? By its first bytes: JPEG, PNG of up to 8 bits
    and still WebP; of other formats DALI refuses some and scales or turns others."""
    head = bytes(data[:32])
    if head[:2] == _JPEG:
        return True
    if head[:8] == _PNG:
        return len(head) > 24 and head[24] <= 8  # IHDR: bit depth
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return head[12:16] != b"VP8X" or not head[20] & _ANIMATED_WEBP
    return False


def as_ppm(data: bytes | memoryview) -> bytes:
    """A file's pixels as an uncompressed PPM, which every decoder reads the same way. Raises OSError or ValueError."""
    try:
        with open_image(data) as opened:
            image = to_rgb(opened)
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return b"P6\n%d %d\n255\n" % image.size + image.tobytes()
