"""Atomic writes: a file is complete or absent, after a power failure too."""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

DISK_FULL = "disk full"
LATE_S = 3.0  #: seconds that a network file system may need to show what another node made
#: what a network file system says while its server is away for a moment
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ENETDOWN, errno.EHOSTDOWN}
FREE = "free some space"  #: the remedy for what `why_full` says


def why_full(error: OSError, path: Path | str) -> str:
    """What ENOSPC or EDQUOT means for a file at `path`: "disk full", "no inode left ..." or "quota exceeded ..."."""
    if error.errno == errno.EDQUOT:
        return "quota exceeded (see: quota -s, or lfs quota)"
    place = next((place for place in (Path(path), *Path(path).absolute().parents) if place.is_dir()), Path("/"))
    try:
        stat = os.statvfs(place)
    except OSError:
        return DISK_FULL
    if stat.f_files and not stat.f_favail and stat.f_bavail:
        free = stat.f_bavail * stat.f_frsize / 1e9
        return f"no inode left for another file, though {free:,.1f} GB are free (see: df -i {place})"
    return DISK_FULL


def reason_of(error: OSError, path: Path | str) -> str:
    """Why `path` could not be written, in words: `why_full`, or what the operating system says."""
    why = why_full(error, path) if error.errno in (errno.ENOSPC, errno.EDQUOT) else DISK_FULL
    return error.strerror or str(error) if why == DISK_FULL else why


@contextlib.contextmanager
def atomic_open(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write, beside `path` under a temporary name (`.NAME.PID-HEX.tmp`). At the end of the block it
    is flushed to disk and renamed to `path`. If the block raises, it is removed and `path` is unchanged.
    durable: False skips the flush, for files that can be generated again. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: str | bytes, durable: bool = True) -> None:
    """Write a small file atomically, as `atomic_open` does. Text is written as UTF-8. Raises OSError."""
    with atomic_open(path, durable) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def appears(path: Path, within_s: float = LATE_S) -> bool:
    """Is `path` there, or will it be within some seconds? A network file system may show late what another node made;
    listing the folders above asks its server again."""
    deadline = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        for folder in reversed(path.absolute().parents):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.1)
    return True


def read_note(path: Path) -> str:
    """The text of a small file, or of a link that stands for it: a link can be made on a full disk, its target is the
    text. Raises OSError."""
    return str(path.readlink()) if path.is_symlink() else path.read_text(encoding="utf-8")


def why_unfit(folder: Path, size: int = 0) -> str | None:
    """Why no run can live in `folder`, which is there: a run writes files (here one of `size` bytes), appends to them
    and renames folders. None where it can. Mounted object storage often can't append, or rename a folder with files."""
    trial, moved = (folder / f".writable.{os.getpid()}-{os.urandom(4).hex()}.tmp" for _ in range(2))
    file = trial / "file"
    steps: list[tuple[str, Callable[[], object]]] = [
        ("be written", trial.mkdir),
        ("be written", lambda: file.write_bytes(bytes(size))),
        ("append to a file", lambda: file.open("ab").close()),
        ("rename a folder", lambda: trial.rename(moved)),
    ]
    try:
        for doing, step in steps:
            try:
                step()
            except OSError as error:
                if doing == "be written":
                    return f"can't {doing} ({error.strerror})"
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):  # another start has cleaned up
                    return (
                        f"is on a file system that can't {doing} ({error.strerror}), like much mounted object storage"
                    )
    finally:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(moved, ignore_errors=True)
    return None


def keep_to_own_package() -> None:
    """Where the current folder holds another package or module of this one's name: let the Python processes that this
    one starts not look there, as `python -m` does before anything else. (Networks of the user's own are found by
    `load_function`.)"""
    home = Path(__file__).parent
    others = (Path(home.name, "__init__.py"), Path(f"{home.name}.py"))
    if any(other.exists() for other in others) and Path(home.name).resolve() != home.resolve():
        os.environ.setdefault("PYTHONSAFEPATH", "1")


def give_home() -> str | None:
    """Where this account has no home folder (HOME is not set and its uid is in no passwd file, as in many containers):
    set HOME to one of its own below the temporary folder, and LOGNAME, which torch and W&B ask for.

    Returns what was done, in words; None where there is a home.
    """
    try:
        Path.home()
        return None
    except RuntimeError:
        pass
    uid = os.getuid()
    home = Path(tempfile.gettempdir()) / f"pipeline-home-{uid}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        facts = home.lstat()
        ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == uid and not facts.st_mode & 0o077
    except OSError:
        ours = False
    if not ours:  # another account was there first
        home = Path(tempfile.mkdtemp(prefix=f"pipeline-home-{uid}-"))
    os.environ["HOME"] = str(home)
    os.environ.setdefault("LOGNAME", str(uid))
    return f"uid {uid} has no home folder and HOME is not set: caches and keys are looked for in {home}"
