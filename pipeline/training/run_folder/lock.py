"""One job a run folder: the file `lock` in it names who trains there. Knows no torch.

It is made by `link`, which is atomic on NFS too, and its owner touches it every few seconds. Whoever finds it asks
whether the owner lives: on the same machine by process id and start time; elsewhere by the lock's age on the file
system's own clock, or, where that is no answer, by watching whether it is still touched. A dead owner's lock is taken
over. An owner that finds its lock in other hands (it was held up for so long that it counted as dead) ends at once.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from pipeline.errors import EXIT_RETRY, TransientError, UserError
from pipeline.logs import logger
from pipeline.run_paths import RunPaths
from pipeline.training.ranks.launcher import current_launch

HEARTBEAT_S = 5.0
LEASE_S = 3.0  # a launcher is cut off after 5 s of silence, so within this time nobody has taken the lock
STALE_S = 60.0  # a lock untouched for so long belongs to nobody


def _start_of(pid: int) -> str | None:
    """When a process began, in clock ticks since boot (proc(5), stat, field 22); None: there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boottime() -> float:
    """Seconds since boot, also while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _machine() -> str:
    """This boot of this machine, and the process ids that can be seen from here."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - a link to no path


def _name(owner: dict) -> str:
    job = f", Slurm job {owner['slurm_job_id']}" if owner.get("slurm_job_id") else ""
    return f"{owner.get('host')}, pid {owner.get('pid')}{job}"


def dead_owner(folder: Path) -> str | None:
    """Host and pid of a process of this machine that had the lock of a run folder and is gone. None: nobody had it, it
    lives, or that can't be seen from here."""
    try:
        owner = RunLock._read(RunPaths(folder).lock)
        is_ours = owner is not None and owner.get("machine") == _machine()
    except OSError:
        return None
    return f"host {_name(owner)}" if owner is not None and is_ours and not _is_there(owner) else None


def _is_there(owner: dict) -> bool:
    """Does the process of this machine that has a lock still run?"""
    return owner.get("pid_start") is not None and _start_of(owner["pid"]) == owner["pid_start"]


class RunLock:
    """The lock of a run folder, held from `acquire` to `release`.

    Args:
        folder: the run folder; it exists by the time of `acquire`.
        say: prints one line to the user.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = logger.info):
        self.folder, self.say = folder, say
        self.path = RunPaths(folder).lock
        self.held = False
        self._device = 0  # the file system of the folder
        self._beat_s = HEARTBEAT_S
        self._confirmed = 0.0  # when the lock was last seen to be ours, by `_boottime`
        self._ended = threading.Event()
        self._me: dict = {}

    def acquire(self) -> None:
        """Take the lock. Raises UserError, naming host, pid and job, if another living process has it, and
        TransientError where the disk refuses."""
        self._identify()
        try:
            self._take(self.path)
            self._sweep()
        except OSError as error:
            raise TransientError(
                f"the lock {self.path} can't be written ({error.strerror})", on_all_ranks=True
            ) from error
        self.held, self._device, self._confirmed = True, self.folder.stat().st_dev, _boottime()
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def owner(self) -> str | None:
        """Host, pid and job of the living process that has the lock; None: nobody, or it can't be found out."""
        self._identify()
        try:
            owner = self._read(self.path)
            return _name(owner) if owner is not None and self._lives(self.path, owner) else None
        except OSError:
            return None

    def _identify(self) -> None:
        self._me = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_start": _start_of(os.getpid()),
            "machine": _machine(),
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "slurm_restart_count": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "since": time.time(),
        }
        launch = current_launch()
        if launch is not None:
            self._me |= {"launch_job": launch.job, "launch_round": launch.round}
            self._beat_s = min(self._beat_s, LEASE_S / 3)

    def _take(self, path: Path) -> None:
        """Make `path` ours. A dead owner's is replaced while a lock on that very owner is held, so that of several
        who find it dead only one does so."""
        while not self._link(path):
            owner = self._read(path)
            if owner is None:
                continue  # released since
            if self._lives(path, owner):
                raise UserError(
                    f"run folder {self.folder} is in use by host {_name(owner)}; "
                    f"wait for it, end it (touch {self.folder}/stop), or give another --run_dir"
                )
            claim = self.folder / f".lock.{owner.get('token')}"
            self._take(claim)
            try:
                found = self._read(path)
                if found is not None and found.get("token") == owner.get("token"):
                    copied = self._is_copy(path, owner)
                    self._temporary().replace(path)
                    if path == self.path:
                        why = "this folder is a copy of its" if copied else "that process has ended"
                        self.say(f"lock of host {owner.get('host')}, pid {owner.get('pid')} taken over: {why}")
                    return
            finally:
                claim.unlink(missing_ok=True)

    def _temporary(self) -> Path:
        """Our name in a file of its own."""
        path = self.folder / f".lock.{self._me['token']}.tmp"
        with path.open("w", encoding="utf-8") as file:
            self._write(file)
            file.flush()
            os.fsync(file.fileno())  # an empty lock after a power cut would have to be watched for a minute
        return path

    def _write(self, file: TextIO) -> None:
        """Our name, and the file's own number, which a copy of the run folder does not have."""
        file.write(json.dumps(self._me | {"inode": os.fstat(file.fileno()).st_ino}) + "\n")

    def _link(self, path: Path) -> bool:
        """Make `path` with our name in it, if it is not there. (NFS may report a failure of a link that it made.)

        A file system without links says so in many ways, EIO among them. Where it can't be written at all, `_create`
        fails, too."""
        temporary = self._temporary()
        try:
            path.hardlink_to(temporary)
            return True
        except OSError as error:
            if temporary.stat().st_nlink == 2:
                return True
            return not isinstance(error, FileExistsError) and self._create(path)
        finally:
            temporary.unlink()

    def _create(self, path: Path) -> bool:
        """The same where a file system has no links; a reader may find it empty for a moment."""
        try:
            with path.open("x", encoding="utf-8") as file:
                self._write(file)
        except FileExistsError:
            return False
        return True

    def _sweep(self) -> None:
        """Remove what starts left behind that were killed while they took the lock."""
        now = self._clock()
        for path in self.folder.glob(".lock.*"):
            if now - (self._touched(path) or now) > STALE_S:
                path.unlink(missing_ok=True)

    @staticmethod
    def _read(path: Path) -> dict | None:
        """Who has the lock; None: nobody."""
        try:
            owner = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            owner = None
        return owner if isinstance(owner, dict) else {"token": "unreadable"}

    def _lives(self, path: Path, owner: dict) -> bool:
        """Is the owner of a lock still there? May take as long as a lock takes to grow stale."""
        if "launch_job" in self._me and owner.get("launch_job") == self._me["launch_job"]:
            return not owner["launch_round"] < self._me["launch_round"]  # cut off from the job, even if it is there
        if owner.get("machine") == self._me["machine"] and (not _is_there(owner) or not self._is_copy(path, owner)):
            return _is_there(owner)
        restarted = self._me["slurm_restart_count"] > (owner.get("slurm_restart_count") or 0)
        if restarted and owner.get("slurm_job_id") == self._me["slurm_job_id"]:
            return False  # Slurm starts a job again only when it has ended
        seen = self._touched(path)
        if seen is None or self._clock() - seen > STALE_S:
            return False
        self.say(f"watching whether host {owner.get('host')}, pid {owner.get('pid')} still holds {path}")
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            self._ended.wait(HEARTBEAT_S / 10)
            now = self._touched(path)
            if now != seen:
                return now is not None
        return False

    @staticmethod
    def _is_copy(path: Path, owner: dict) -> bool:
        """Was a lock copied with its run folder? (Or its file system gives numbers that change.) Its owner, who trains
        in the other folder, does not touch it."""
        try:
            return owner.get("inode", (there := path.stat().st_ino)) != there
        except FileNotFoundError:
            return False

    @staticmethod
    def _touched(path: Path) -> float | None:
        """When the lock was last touched. Opened first: NFS looks again only then."""
        try:
            with path.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _clock(self) -> float:
        """The time by the clock that stamps this folder's files."""
        temporary = self._temporary()
        now = self._touched(temporary)
        temporary.unlink()
        return time.time() if now is None else now

    def _beat(self) -> None:
        """Touch the lock until it is released."""
        while not self._ended.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a file system that is away for a while
                if not self._is_ours() and self.folder.stat().st_dev == self._device:  # else: it is not mounted
                    self._link(self.path)
                os.utime(self.path)

    def _is_ours(self) -> bool:
        """Is the lock ours? False: it is nobody's. Where it is another's, this process ends."""
        asked = _boottime()
        owner = self._read(self.path)
        if owner is None:
            return False
        if owner.get("token") != self._me["token"]:
            print(
                f"pipeline train: run folder {self.folder} was taken over by host {owner.get('host')}, pid "
                f"{owner.get('pid')}; ending at once",
                file=sys.stderr,
                flush=True,
            )
            os._exit(EXIT_RETRY)  # nothing more may be written
        self._confirmed = asked
        return True

    def confirm(self) -> None:
        """Called before anything is written to the run folder: under `pipeline launch` a process that was held up may
        have been cut off from the job, and another world may train here. Then this process ends."""
        if self.held and "launch_job" in self._me and _boottime() - self._confirmed > LEASE_S:
            with contextlib.suppress(OSError):
                self._is_ours()

    def release(self) -> None:
        """Give the lock back, if it is held."""
        self._ended.set()
        if self.held:
            self.held = False
            with contextlib.suppress(OSError):
                owner = self._read(self.path)
                if owner is not None and owner.get("token") == self._me["token"]:
                    self.path.unlink()
