"""Samples put where a shard has a place for them, in any order and by several processes at once."""

import os
from pathlib import Path

from pipeline.dataset.disk import explain
from pipeline.dataset.shards.format import BLOCK, tar_header, temporary_path


def sample_members(key: str, suffix: str, data: bytes, label: int) -> bytes:
    """The two members of a sample as they stand in a shard: KEY.SUFFIX with the image, KEY.cls with the label."""
    before, after = sample_frame(key, suffix, data, label)
    return b"".join((before, data, after))


def sample_frame(key: str, suffix: str, data: bytes, label: int) -> tuple[bytes, bytes]:
    """What stands before and behind the image of a sample in its shard: its header; padding, and its label's member."""
    text = str(label).encode()
    parts = bytes(-len(data) % BLOCK), tar_header(f"{key}.cls", len(text)), text, bytes(-len(text) % BLOCK)
    return tar_header(f"{key}.{suffix}", len(data)), b"".join(parts)


def write_in_place(dest: Path, split: str, number: int, members: bytes, start: int) -> None:
    """Write `members` at byte `start` of an unfinished shard, which is made where there is none.

    Raises UserError where the disk is full or the folder can't be written.
    """
    path, left = temporary_path(dest, split, number), memoryview(members)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while left:
                written = os.pwrite(descriptor, left, start)
                left, start = left[written:], start + written
        finally:
            os.close(descriptor)
    except OSError as error:
        raise explain(error, path) from error
