"""The disk of a data root: free space, flushing, and one-line errors."""

import ctypes
import errno
import os
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import TransientError, UserError
from pipeline.files import FREE, why_full

BLOCK = 4096  #: bytes that a file's size is rounded up to, as most file systems do


def explain(error: OSError, path: Path | str) -> UserError | TransientError:
    """One line for a file system's error: UserError for a full disk or a missing permission, else TransientError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{why_full(error, path)} while writing {path}; {FREE} and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return UserError(f"can't write {path} ({error.strerror}); fix that or give another folder")
    return TransientError(f"can't write {path} ({error.strerror or error})")


def explain_read(error: OSError, path: Path | str) -> UserError | TransientError:
    """One line for a source that can't be read: UserError where it is gone or forbidden, else TransientError."""
    problem = f"can't read {path} ({error.strerror or error})"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM):
        return UserError(f"{problem}; fix that or give another root")
    return TransientError(f"{problem}; run the same command again")


def check_space(
    folder: Path, needed: float, files: int = 0, remedy: str = "free some space or give another folder"
) -> None:
    """UserError with the figure where the disk of `folder` has less than `needed` bytes, or too few inodes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} has {free / 1e9:,.3f} GB free, but {needed / 1e9:,.3f} GB are needed; {remedy}")
    stat = os.statvfs(folder)
    if stat.f_files and stat.f_favail < files and not (stat.f_favail == 0 and _takes_a_file(folder)):
        raise UserError(
            f"the disk of {folder} has room for {stat.f_favail:,} more files, but {files:,} are needed; {remedy}"
        )


def _takes_a_file(folder: Path) -> bool:
    """Has it room for a file, whatever it says? (rclone's mounts say that there is none.)"""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".room.", suffix=".tmp"):
            return True
    except OSError:
        return False


def flush_file_system(folder: Path) -> None:
    """Wait until everything written to the file system of `folder` is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
        if syncfs is None:
            os.sync()
        elif syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(descriptor)
