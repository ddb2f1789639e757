"""A node's folder in memory, where its ranks leave snapshots for the next round; gone when the launcher is."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")


def _mine() -> str:
    """Begins the names of this user's folders, where process ids mean what they mean here."""
    return f"pipeline-{os.getuid()}-{os.stat('/proc/self/ns/pid').st_ino}"


class LocalFolder:
    """`path`: the folder, of this user alone; None where there is no /dev/shm. `remove` at the end.

    Args:
        job: its name.
    """

    def __init__(self, job: str):
        self.path: Path | None = None
        if not MEMORY.is_dir():
            return
        self._remove_leftovers()
        name = hashlib.sha256(job.encode()).hexdigest()[:8]
        with contextlib.suppress(OSError):  # no room, or not ours to write
            self.path = Path(tempfile.mkdtemp(prefix=f"{_mine()}-{os.getpid()}-{name}-", dir=MEMORY))

    @staticmethod
    def _remove_leftovers() -> None:
        """Folders of launchers of this user that were killed."""
        for path in MEMORY.glob(f"{_mine()}-[0-9]*"):
            pid = path.name.removeprefix(f"{_mine()}-").split("-")[0]
            with contextlib.suppress(OSError, ValueError):
                if path.stat().st_uid == os.getuid() and not Path(f"/proc/{int(pid)}").exists():
                    shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove the folder."""
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
