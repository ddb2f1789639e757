"""Which members are whole on disk: an append-only file that survives SIGKILL at any byte, and a power cut.

Twelve bytes a member. A kill loses nothing that was noted, because the page cache outlives the process. A power cut
may: so every minute or so the file system is flushed and a barrier noted; after a boot, what was noted behind the
last barrier is forgotten, and the survey of the tree checks those files against their CRCs.
"""

import errno
import os
import struct
from pathlib import Path

import numpy as np
import xxhash

from pipeline.dataset.disk import explain, flush_file_system

DONE, BARRIER, BOOT = 1, 2, 3
RECORD = np.dtype([("kind", "<u4"), ("value", "<u4"), ("check", "<u4")])
HEADER = struct.Struct("<8sQ")
MAGIC = b"fetched1"


def boot_number() -> int:
    """A number that differs from boot to boot and from machine to machine."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return xxhash.xxh32_intdigest(path.read_bytes()) if path.exists() else 0


class Journal:
    """Notes members of one archive, known by its 64-bit `fingerprint`; a journal of another archive is dropped.

    `trusted`: sorted numbers of the members that were whole when this was opened. `add` is safe from several threads.
    """

    def __init__(self, path: Path, fingerprint: int):
        self.path = path
        records = _load(path, fingerprint)
        boots = records["value"][records["kind"] == BOOT]
        same_boot = len(boots) > 0 and boots[-1] == boot_number()
        if not same_boot:
            barriers = records["value"][records["kind"] == BARRIER]
            records = records[: barriers[-1] if len(barriers) else 0]
        self.trusted = np.unique(records["value"][records["kind"] == DONE])
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.ftruncate(self.descriptor, HEADER.size + records.nbytes if len(records) else 0)
        if not len(records):
            os.write(self.descriptor, HEADER.pack(MAGIC, fingerprint))
        if not same_boot or not len(records):
            self._append(BOOT, boot_number())

    def _append(self, kind: int, value: int) -> None:
        record = struct.pack("<3L", kind, value, _check(kind, value))
        try:
            if os.write(self.descriptor, record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise explain(error, self.path) from error

    def add(self, number: int) -> None:
        """Note that a member is whole in its place."""
        self._append(DONE, number)

    def barrier(self) -> None:
        """Flush the file system, so that all that was noted before this call outlives a power cut."""
        covered = (os.fstat(self.descriptor).st_size - HEADER.size) // RECORD.itemsize
        flush_file_system(self.path.parent)
        self._append(BARRIER, covered)

    def close(self) -> None:
        os.close(self.descriptor)


def _check(kind: int, value: int) -> int:
    return (value ^ 0x9E3779B9) * (2 * kind + 1) & 0xFFFFFFFF


def _load(path: Path, fingerprint: int) -> np.ndarray:
    """The sound records from the start; none where there is no journal of this archive."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if len(data) < HEADER.size or HEADER.unpack_from(data) != (MAGIC, fingerprint):
        return np.zeros(0, RECORD)
    whole = (len(data) - HEADER.size) // RECORD.itemsize
    records = np.frombuffer(data, RECORD, whole, HEADER.size)
    kind, value = (records[key].astype(np.uint64) for key in ("kind", "value"))
    sound = ((value ^ np.uint64(0x9E3779B9)) * (2 * kind + np.uint64(1))) & np.uint64(0xFFFFFFFF) == records["check"]
    return records if sound.all() else records[: int(np.argmin(sound))]
