"""Locks between processes, by files: one process at a time indexes, copies or fetches into a folder."""

import contextlib
import errno
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import UserError

#: of a file system without locks
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EPERM)


def try_lock(file: IO) -> bool:
    """Lock an open file exclusively until it is closed; False if another process holds the lock.

    On a file system without locks: True. Raises OSError.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


@contextlib.contextmanager
def locked(path: Path, busy: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, created if missing.

    busy: message if another process holds it: printed before waiting for it, or with `wait=False` raised as UserError.
    Raises OSError where the file can't be opened.
    """
    with path.open("a") as file:
        if not try_lock(file):
            if not wait:
                raise UserError(busy)
            print(busy, file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
