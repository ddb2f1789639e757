"""What this process may use of its machine: cores, memory, open files. A container or a batch job mostly has less than
the machine, by its affinity mask or by its control groups (cgroup v1 and v2, and all groups above its own)."""

import contextlib
import math
import os
import resource
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

_GROUPS = Path("/proc/self/cgroup")
_MOUNTS = Path("/proc/self/mountinfo")
_USUAL = Path("/sys/fs/cgroup")  # where the groups are mounted, nearly everywhere
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" by a number near 2**63
SPARE_FILES = 1024  #: open files that libraries, workers and connections may need
MOST_CORES = 1024  #: of the largest nodes: more threads or processes of one program are a mistake
MOST_FILES = 1 << 20  #: some programs look at every file that may be open
_RANK_FILES = 256  # of a rank alone: libraries, images, shards, checkpoints, W&B


def available_cores() -> int:
    """Cores that this process may use, at least 1: those of its affinity mask, and no more than its CPU quota, rounded
    up."""
    cores = len(os.sched_getaffinity(0))
    quota = min(_cpu_quotas(), default=math.inf)
    return max(1, min(cores, math.ceil(quota - 1e-6) if quota < cores else cores))


def share_of_cores(masks: Sequence[Collection[int]], own: int) -> int:
    """The cores of the rank in place `own`, at least 1: of its affinity mask, each core shared by the ranks of this
    machine that may use it, and an equal part of the CPU quota.

    masks: the affinity mask of each rank of this machine. Ranks that are bound to the NUMA node of their GPU share it
    with the ranks of that node alone.
    """
    users = Counter(core for mask in masks for core in mask)
    share = sum(1 / users[core] for core in masks[own])
    return max(1, math.floor(min([share, *(quota / len(masks) for quota in _cpu_quotas())]) + 1e-6))


def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or those of a control group."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _memory_groups())])


def available_memory() -> int:
    """Bytes of memory that this process can still take: of the machine, of its control groups, by its own limit."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    for limit, used in _memory_groups():
        available = min(available, limit - used)
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    if own != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        available = min(available, own - used)
    return max(0, available)


def open_files_limit(wanted: int) -> int:
    """How many files this process may have open, after raising its soft limit towards `wanted` as far as the hard limit
    allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return wanted if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        return soft
    return most


def files_needed(ranks: int) -> int:
    """Files that a rank has open at most, among so many ranks: its two gloo groups are full meshes, with a connection
    to each other rank."""
    return _RANK_FILES + 2 * (ranks - 1)


def _cpu_quotas() -> Iterator[float]:
    """The quota of each control group that has one, in cores."""
    for folder in _folders("cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # v2
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            yield int(quota) / int(period)  # "max": no number
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # v1
            micros = int((folder / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
            if micros > 0:
                yield micros / int((folder / "cpu.cfs_period_us").read_text(encoding="utf-8"))


def _memory_groups() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that can't be reclaimed) of each control group that has a limit."""
    for folder in _folders("memory"):
        for limit_name, used_name, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / limit_name).read_text(encoding="utf-8"))
                if limit < _UNLIMITED:
                    used = int((folder / used_name).read_text(encoding="utf-8"))
                    yield limit, max(0, used - _statistic(folder / "memory.stat", cache))


def _statistic(path: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def _folders(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups for a controller, and of all groups above, as far as they are seen
    here; v1 and v2 may both be mounted."""
    seen = set()
    for top, inside in [*_mounted(controller), *_at_usual_places(controller)]:
        for part in (inside, *inside.parents):
            folder = top / part
            if folder not in seen and folder.is_dir():
                seen.add(folder)
                yield folder


def _own_groups() -> Iterator[tuple[list[str], PurePosixPath]]:
    """(controllers, path) of each line of /proc/self/cgroup; v2 has no controllers there."""
    with contextlib.suppress(OSError):
        for line in _GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            yield [name for name in controllers.split(",") if name], PurePosixPath(path)


def _mounted(controller: str) -> Iterator[tuple[Path, PurePosixPath]]:
    """(mount point, the group's path below it) by the kernel's table of mounts."""
    lines = []
    with contextlib.suppress(OSError):
        lines = _MOUNTS.read_text(encoding="utf-8").splitlines()
    for line in lines:
        before, _, after = line.partition(" - ")
        kind, _, *options = after.split()
        if kind not in ("cgroup", "cgroup2"):
            continue
        root, point = before.split()[3:5]
        named = controller in options[-1].split(",")
        for controllers, path in _own_groups():
            if (kind == "cgroup2" and not controllers) or (named and controller in controllers):
                below = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
                yield Path(point), PurePosixPath(str(below).lstrip("/"))


def _at_usual_places(controller: str) -> Iterator[tuple[Path, PurePosixPath]]:
    """The same where the table of mounts does not say."""
    for controllers, path in _own_groups():
        inside = PurePosixPath(str(path).lstrip("/"))
        if not controllers:
            yield _USUAL, inside
        elif controller in controllers:
            yield from ((_USUAL / name, inside) for name in {controller, ",".join(controllers)})
