"""Restart markers added to a JPEG, losslessly: the same coefficients, coded in independent intervals.

The work is done by `jpegtran`, libjpeg-turbo's own transcoder: a kept program of every Linux distribution. Its library
can't be called instead without a compiled extension: libjpeg reports errors by a jump that only C can catch, and the
TurboJPEG functions that Python can call set no restart interval when they transcode. A process for each image costs
a fraction of a millisecond of the 5, and hostile bytes can crash only that process.
"""

import contextlib
import functools
import os
import shutil
import warnings
from io import BytesIO

from pipeline.dataset.shards.jpeg import choose_interval, is_transcodable, read_frame
from pipeline.errors import UserError

PROGRAM = "jpegtran"


@functools.cache
def find_program() -> str:
    """Path of `jpegtran`. Raises UserError where it is not installed."""
    path = shutil.which(PROGRAM)
    if path is None:
        raise UserError(
            f"adding restart markers requires the program {PROGRAM} of libjpeg-turbo; install it "
            "(Debian, Ubuntu: apt-get install libjpeg-turbo-progs; conda: libjpeg-turbo)"
        )
    return path


def transcode(data: bytes, interval: int) -> bytes | None:
    """The JPEG as baseline with a restart marker about every `interval` MCUs, optimized Huffman tables and no metadata.

    The interval is the divisor of the MCU columns nearest to `interval`. The result decodes to the same pixels: both
    are decoded here and compared. None where it can't be had (no JPEG, CMYK, arithmetic coding, damaged): the original
    is to be kept. Raises UserError where `jpegtran` is not installed.
    """
    frame = read_frame(data)
    if frame is None or not is_transcodable(frame):
        return None
    made = _run(["-copy", "none", "-optimize", "-restart", f"{choose_interval(frame.mcu_columns, interval)}B"], data)
    if made is None:
        return None
    new = read_frame(made)
    if new is None or (new.width, new.height) != (frame.width, frame.height) or not new.interval:
        return None
    return made if _equal_pixels(data, made) else None


def _run(arguments: list[str], data: bytes) -> bytes | None:
    """Standard output of `jpegtran` for `data` on its standard input; None where it complains at all.

    `posix_spawn` with files in memory: a third of what `subprocess` with pipes costs.
    """
    program = find_program()
    source, made = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("source", "made"))
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(source, data)
        os.lseek(source, 0, os.SEEK_SET)
        streams = ((source, 0), (made, 1), (null, 2))
        actions = [(os.POSIX_SPAWN_DUP2, descriptor, number) for descriptor, number in streams]
        process = os.posix_spawn(program, [PROGRAM, *arguments], {}, file_actions=actions)
        _, status = os.waitpid(process, 0)
        return os.pread(made, os.fstat(made).st_size, 0) if status == 0 else None  # a warning is status 2
    finally:
        for descriptor in (source, made, null):
            os.close(descriptor)


def _equal_pixels(one: bytes, other: bytes) -> bool:
    """Do both decode, by PIL, to the same pixels?"""
    from PIL import Image, ImageChops

    with warnings.catch_warnings(), contextlib.suppress(OSError, ValueError, SyntaxError, EOFError):
        warnings.simplefilter("ignore")
        with Image.open(BytesIO(one)) as a, Image.open(BytesIO(other)) as b:
            if (a.mode, a.size) != (b.mode, b.size):
                return False
            return ImageChops.difference(a, b).getbbox() is None
    return False
