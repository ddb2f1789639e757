"""What a container or a batch job may use: cores, memory and open files, by cgroup v1 and v2 and by rlimits."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import limits
from pipeline.dataset.index.scan import build_index
from pipeline.dataset.shards.pack import pack_tree
from pipeline.dataset.shards.plan import Options
from pipeline.dataset.workers import map_in_order
from pipeline.errors import UserError
from pipeline.loader.source import Source

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A machine of 64 cores whose control groups are files in a folder; returns a function that writes them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(limits, "_USUAL", tmp_path / "sys")

    def write(cgroup: str, mounts: str = "", **files: str) -> None:
        (tmp_path / "cgroup").write_text(cgroup)
        (tmp_path / "mountinfo").write_text(mounts.replace("SYS", str(tmp_path / "sys")))
        for name, text in files.items():
            path = tmp_path / "sys" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


V2 = "30 23 0:26 / SYS rw - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 / SYS/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 / SYS/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.mark.parametrize("mounts", [V2, ""])
@pytest.mark.parametrize(("quota", "cores"), [("400000 100000", 4), ("350000 100000", 4), ("50000 100000", 1)])
def test_a_quota_of_cgroup_v2_counts(groups, mounts, quota, cores):
    groups("0::/job\n", mounts, job__cpu_DOT_max=quota)
    assert limits.available_cores() == cores


def test_no_quota_and_a_quota_above_the_mask_leave_the_mask(groups, monkeypatch):
    groups("0::/job\n", V2, job__cpu_DOT_max="max 100000")
    assert limits.available_cores() == 64
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    groups("0::/job\n", V2, job__cpu_DOT_max="1600000 100000")
    assert limits.available_cores() == 2


def test_the_quota_of_a_group_above_counts(groups):
    groups("0::/slurm/job/step\n", V2, slurm__job__step__cpu_DOT_max="max 100000", slurm__cpu_DOT_max="800000 100000")
    assert limits.available_cores() == 8


@pytest.mark.parametrize("mounts", [V1, ""])
def test_a_quota_of_cgroup_v1_counts(groups, mounts):
    files = {"cpu,cpuacct__job__cpu_DOT_cfs_quota_us": "600000", "cpu,cpuacct__job__cpu_DOT_cfs_period_us": "100000"}
    groups("4:memory:/job\n3:cpu,cpuacct:/job\n", mounts, **files)
    assert limits.available_cores() == 6
    groups("3:cpu,cpuacct:/job\n", mounts, **{"cpu,cpuacct__job__cpu_DOT_cfs_quota_us": "-1"})
    assert limits.available_cores() == 64


def test_inside_a_container_the_mount_is_the_containers_own_group(groups):
    """Docker with cgroup v1 shows the host's path in /proc/self/cgroup, and mounts just that group."""
    mounts = "32 31 0:29 /docker/ab12 SYS/cpu rw - cgroup cgroup rw,cpu\n"
    files = {"cpu__cpu_DOT_cfs_quota_us": "200000", "cpu__cpu_DOT_cfs_period_us": "100000"}
    groups("3:cpu:/docker/ab12\n", mounts, **files)
    assert limits.available_cores() == 2


def test_memory_is_the_groups(groups):
    groups(
        "0::/job\n",
        V2,
        job__memory_DOT_max=str(512 * MIB),
        job__memory_DOT_current=str(400 * MIB),
        job__memory_DOT_stat=f"anon 5\ninactive_file {100 * MIB}\n",
    )
    assert limits.memory_limit() == 512 * MIB
    assert limits.available_memory() == 212 * MIB  # what is cached of files can be taken


def test_memory_of_cgroup_v1_is_the_smallest_of_all_groups(groups):
    groups(
        "4:memory:/a/b\n",
        V1,
        memory__a__b__memory_DOT_limit_in_bytes=str(0x7FFFFFFFFFFFF000),  # none
        memory__a__memory_DOT_limit_in_bytes=str(256 * MIB),
        memory__a__memory_DOT_usage_in_bytes=str(56 * MIB),
    )
    assert (limits.memory_limit(), limits.available_memory()) == (256 * MIB, 200 * MIB)


def test_without_control_groups_the_machine_counts(groups):
    groups("")
    assert limits.available_cores() == 64
    assert limits.memory_limit() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu/cgroup.procs", os.W_OK), reason="needs a writable cgroup v1")
def test_a_real_quota_is_seen():
    group = Path("/sys/fs/cgroup/cpu") / f"pipeline-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("100000")
        ask = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        ask += "from pipeline.limits import available_cores; print(available_cores())"
        command = [sys.executable, "-c", ask, str(group / "cgroup.procs")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["1"]
    finally:
        group.rmdir()


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    """70 images in 70 shards."""
    from PIL import Image

    base = tmp_path_factory.mktemp("many")
    noise = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 10)):
        (base / "tree" / split / "a").mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 255, (600, 600, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(base / "tree" / split / "a" / f"{i:02}.bmp")
    pack_tree(base / "tree", base / "shards", Options(shard_mb=1))
    return base / "shards"


READ_ALL = """
import resource, sys
from pathlib import Path
import numpy as np
from pipeline.dataset.index.index import open_index
from pipeline.loader.source import Source
import torch, nvidia  # what a rank has open, too
soft, hard = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
source = Source(open_index(Path(sys.argv[1]) / "index").splits["train"])
for _ in range(3):
    assert all(isinstance(data, np.ndarray) for data in source.read_batch(np.arange(60)))
print(len(source._shards), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(("soft", "hard", "kept"), [(40, 4096, 60), (40, 40, 10), (48, 48, 12)])
def test_more_shards_than_file_handles(many_shards, soft, hard, kept):
    """The soft limit is raised as far as needed; where the hard one forbids that, few shards are open at a time."""
    command = [sys.executable, "-c", READ_ALL, str(many_shards), str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    opened, limit = map(int, done.stdout.split())
    assert opened == kept and soft <= limit <= hard


def test_a_shard_closes_with_its_last_reader(many_shards):
    from pipeline.dataset.index.index import open_index

    source = Source(open_index(many_shards / "index").splits["train"])
    source.read(0)
    (held,) = source._shards.values()
    source.close()
    assert os.pread(held.descriptor, 1, 0)
    descriptor = held.descriptor
    del held
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_the_limit_of_this_process_is_not_lowered():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert limits.open_files_limit(16) == before == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_index_counts_with_the_cores_of_the_quota(groups, tmp_path, monkeypatch):
    """A container with two cores of 64 starts two processes, not 64."""
    from test_index import make_folder

    from pipeline.dataset.index import scan_split

    groups("0::/job\n", V2, job__cpu_DOT_max="200000 100000")
    root = make_folder(tmp_path / "set", {f"{split}/a": ["1.png"] for split in ("train", "val")})
    asked = []
    monkeypatch.setattr(scan_split, "SMALL", 0)
    real = scan_split.map_in_order

    def spy(function, tasks, processes):
        asked.append(processes)
        return real(function, tasks, 1)

    monkeypatch.setattr(scan_split, "map_in_order", spy)
    build_index(root)
    assert set(asked) == {2}


def test_ranks_that_are_bound_share_their_numa_node_alone(groups):
    """With --numa-binding=node the affinity mask holds the cores of the ranks beside the same NUMA node."""
    groups("0::/job\n")
    two_sockets = [set(range(56))] * 4 + [set(range(56, 112))] * 4
    assert [limits.share_of_cores(two_sockets, rank) for rank in range(8)] == [14] * 8
    nps4 = [set(range(16 * rank, 16 * rank + 16)) for rank in range(8)]
    assert limits.share_of_cores(nps4, 3) == 16
    uneven = [set(range(12))] * 3 + [set(range(12, 24))]
    assert [limits.share_of_cores(uneven, rank) for rank in range(4)] == [4, 4, 4, 12]
    assert limits.share_of_cores([set(range(8))] * 3, 0) == 2  # not bound
    assert limits.share_of_cores([{0}, {0}], 1) == 1
    groups("0::/job\n", V2, job__cpu_DOT_max="400000 100000")
    assert limits.share_of_cores([{0, 1, 2, 3}, {4, 5, 6, 7}], 0) == 2  # a quota is everyone's


_RANK = """
import os, sys
first = 16 * int(os.environ["LOCAL_RANK"])
own = set(range(first, first + 16)) if sys.argv[1] == "bound" else set(range(32))
os.sched_getaffinity = lambda pid: own if pid == 0 else set(range(32))  # of a machine with two NUMA nodes
from pipeline.config import TrainConfig
from pipeline.loader.build import cores_of
from pipeline.loader.setup import find_rank
from pipeline.training.ranks.world import start_world
world = start_world(TrainConfig(device="cpu"))
sys.stdout.write(f"cores {cores_of(world)} {cores_of(find_rank(None, None, 'cpu'))}\\n")  # in one piece
sys.stdout.flush()
world.close()
os._exit(0)
"""


@pytest.mark.parametrize("how", ["bound", "free"])
def test_two_ranks_under_torchrun_have_half_the_cores_each_bound_or_not(tmp_path, how):
    program = tmp_path / "rank.py"
    program.write_text(_RANK)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*run, str(program), how], capture_output=True, text=True, timeout=100)
    assert sorted(done.stdout.split()) == ["16"] * 4 + ["cores"] * 2, done.stderr


@pytest.mark.parametrize(
    ("given", "threads"), [(None, 3), ("", 3), ("1", 1), ("2,1", 2), ("64", 3), ("0", 3), ("-1", 3), ("many", 3)]
)
def test_threads_that_a_run_alone_computes_with(monkeypatch, given, threads):
    """The cores that it may use, or fewer where OMP_NUM_THREADS says so: two runs can share a machine."""
    from pipeline.config import TrainConfig
    from pipeline.training.ranks import world as worlds

    monkeypatch.setattr(worlds, "available_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    try:
        world = worlds.start_world(TrainConfig(device="cpu"))
        assert (torch.get_num_threads(), world.cores) == (threads, 3)
    finally:
        torch.distributed.destroy_process_group()
        torch.set_num_threads(before)


@pytest.mark.parametrize("processes", [-1, 100_000])
def test_an_impossible_number_of_processes_is_one_line_and_none_is_started(processes):
    started = map_in_order(abs, range(-8, 0), processes)
    with pytest.raises(UserError, match=f"--processes is {processes}; give a number from 1 to 1,024"):
        next(started)
