"""One image file: its bytes read, and decoded in full."""

import errno
import os
import warnings
from typing import NamedTuple

import xxhash

from pipeline.dataset.index.pixels import check_mode, open_image
from pipeline.dataset.names import LFS_POINTER
from pipeline.dataset.workers import read_ahead
from pipeline.errors import TransientError

_LARGEST = (1 << 32) - 1  # bytes of an image, which an index has 32 bits for
_TOO_LARGE = "4 GiB or larger"
_GONE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENXIO)


class ScannedFile(NamedTuple):
    """What one look at a file found; `reason` is empty for a readable image."""

    size: int
    mtime_ns: int
    digest: int = 0
    width: int = 0
    height: int = 0
    reason: str = ""


def decode_fully(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an image whose every byte decodes; raises OSError or ValueError otherwise,
    and for one that the loaders can't turn into 8-bit RGB."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning)  # corrupt EXIF is no fault of the pixels
        try:
            with open_image(data) as image:
                image.load()
                check_mode(image)
                return image.size
        except UnidentifiedImageError:
            if bytes(data[: len(LFS_POINTER)]) == LFS_POINTER:
                raise ValueError("a pointer of Git LFS, not the file itself: run git lfs pull") from None
            raise ValueError("no image, or of an unknown format" if data else "empty file") from None
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:  # a decoder may raise anything on hostile bytes
            raise ValueError(f"{type(error).__name__}: {error}") from error


class FileContent(NamedTuple):
    """A file's bytes, or why there are none."""

    data: bytes
    mtime_ns: int
    reason: str = ""


def read_file(path: str) -> FileContent:
    """Read one file. Raises TransientError where the disk fails, which says nothing about the image."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - one call a file, 1.28 M times
            facts = os.fstat(file.fileno())
            if facts.st_size > _LARGEST:
                return FileContent(b"", facts.st_mtime_ns, _TOO_LARGE)
            return FileContent(file.read(), facts.st_mtime_ns)
    except OSError as error:
        if error.errno not in _GONE:
            raise TransientError(f"can't read {path} ({error.strerror}); run the same command again") from error
        return FileContent(b"", 0, str(error.strerror))


def read_member(member: tuple[str, int, int]) -> FileContent:
    """Read an image in a tar file: (path of the tar, offset, bytes). Errors as of `read_file`."""
    path, offset, size = member
    if size > _LARGEST:
        return FileContent(b"", 0, _TOO_LARGE)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data, mtime_ns = os.pread(descriptor, size, offset), os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _GONE:
            raise TransientError(f"can't read {path} ({error.strerror}); run the same command again") from error
        return FileContent(b"", 0, str(error.strerror))
    return FileContent(data, mtime_ns, "" if len(data) == size else "cut")


def inspect(content: FileContent) -> ScannedFile:
    """Decode one file's bytes."""
    data, mtime_ns, reason = content
    if reason:
        return ScannedFile(0, mtime_ns, reason=reason)
    digest = xxhash.xxh3_64_intdigest(data)
    try:
        width, height = decode_fully(data)
    except (OSError, ValueError) as error:
        return ScannedFile(len(data), mtime_ns, digest, reason=str(error)[:200] or type(error).__name__)
    return ScannedFile(len(data), mtime_ns, digest, width, height)


def inspect_all(paths: list[str]) -> list[ScannedFile]:
    """Read and decode files."""
    return [inspect(content) for content in read_ahead(read_file, paths)]


def inspect_members(members: list[tuple[str, int, int]]) -> list[ScannedFile]:
    """Read and decode images in tar files, as `read_member` takes them."""
    return [inspect(content) for content in read_ahead(read_member, members)]
