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
    return _try(file) is not False


def _try(file: IO, kind: int = fcntl.LOCK_EX) -> bool | None:
    """True: locked; False: another process holds the lock; None: the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def locked(path: Path, busy: str, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, created if missing.

    shared: with others that hold it so.
    busy: message if another process holds it: printed before waiting for it, or with `wait=False` raised as UserError.
    On a file system without locks nothing is held, and one line says so.
    Raises OSError where the file can't be opened.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("a+", encoding="utf-8") as file:  # NFS shares a lock only of a file that is open for reading
        got = _try(file, kind)
        if got is None:
            print(
                f"{path.parent}: its file system has no locks; run only one command at a time here",
                file=sys.stderr,
                flush=True,
            )
        if got is False:
            if not wait:
                raise UserError(busy)
            print(busy, file=sys.stderr, flush=True)
            fcntl.flock(file, kind)
        yield
