"""How many files and connections a rank may have open at once."""

import contextlib
import resource

OWN_FILES = 256  # of a rank alone: libraries, images, shards, checkpoints, W&B
MOST = 1 << 20  # some programs look at every file that may be open


def files_needed(ranks: int) -> int:
    """Files that a rank has open at most, among so many ranks: its two gloo groups are full meshes, with a connection
    to each other rank."""
    return OWN_FILES + 2 * (ranks - 1)


def raise_limit() -> int:
    """Raise this process's limit of open files as far as it may, up to `MOST`; returns it (-1: there is none)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, MOST) if hard >= 0 else MOST
    if 0 <= soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
