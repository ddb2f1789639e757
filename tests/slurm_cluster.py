"""A real Slurm cluster on one machine, for the tests: slurmctld, munged and a slurmd a node, each in namespaces.

One "world" (network, uts, mount and pid namespace) holds the controller and a bridge; every node is a set of namespaces
of its own inside it, with its own hostname, address and process tree. Killing the world's first process removes
everything, and the kernel does so when the process that started it dies. Where the kernel has the freezer, the nodes
run proctrack/cgroup, as real sites do.
"""

import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "setpriv", "ip", "mount", "hostname")
SEARCH_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
CONTROLLER = "10.77.0.254"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")  # a job's states that it does not leave by itself

#: The first process of a namespace: adopts and reaps orphans, and lives until it is killed.
INIT = "while :; do sleep 3600 & wait $!; done"

#: What the world's first process does before: into a freezer group that all the world sees as the root, so that two
#: clusters on one machine don't share one. Kernels offer the freezer beside the unified hierarchy.
WORLD = """
if mount -t cgroup -o freezer freezer "$0/cgroup/freezer"; then
    mkdir "$0/cgroup/freezer/$1" && echo $$ > "$0/cgroup/freezer/$1/cgroup.procs" && umount "$0/cgroup/freezer"
    exec unshare --cgroup bash -c 'mount -t cgroup -o freezer freezer "$0/cgroup/freezer"; touch "$0/up"; '"$2" "$0"
fi
touch "$0/up"
eval "$2"
"""

CONFIG = """\
ClusterName=test
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=30
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
GresTypes=gpu
NodeName=n[1-{nodes}] NodeAddr=10.77.0.[1-{nodes}] CPUs=128 RealMemory=1000 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE
"""


def why_not() -> str | None:
    """Why no cluster can be had here, or None where one can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        return f"no {', '.join(missing)} here: scripts/install_test_tools.sh installs Slurm"
    if os.geteuid() != 0:
        return "namespaces with a network of their own need root"
    trial = subprocess.run(["unshare", *_namespaces(), "true"], capture_output=True, text=True)
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else None


def wait_for(condition: Callable[[], Any], timeout_s: float, what: str | Callable[[], str]) -> Any:
    """Poll until `condition` is true and return its value; AssertionError with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.1)
    return value


class Cluster:
    """A running cluster; a context manager. Its folder is removed at the end unless KEEP_SLURM_TEST is set."""

    def __init__(self, nodes: int = 3):
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.world: subprocess.Popen | None = None
        self.inits: dict[str | None, int] = {}  # node (None: the world) -> pid of its first process
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a unix socket's path has 108 bytes
        _remove_groups("slurm-*")  # of runs that were killed
        try:
            self._write_files()
            self._start_world()
            for node in self.nodes:
                self._start_node(node)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for process in [self.world, *self.daemons.values()]:
            if process is not None:
                process.kill()
                process.wait()
        _remove_groups(self.folder.name)
        if not os.environ.get("KEEP_SLURM_TEST"):
            shutil.rmtree(self.folder, ignore_errors=True)

    # What tests use

    def run(
        self, *command: str | Path, node: str | None = None, check: bool = True, cwd: Path = Path("/"), **options
    ) -> str:
        """Run a command beside the controller, or on a node; returns what it prints."""
        command = [*self._enter(node, cwd), *map(str, command)]
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if check and done.returncode:
            raise AssertionError(f"{shlex.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def sbatch(self, *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit from the folder `cwd`; returns the job's id. `env`: the job's environment besides PATH and HOME."""
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | (env or {})
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=environment).split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_state(self, job: str, *states: str, timeout_s: float = 90) -> str:
        """Wait until the job is in one of `states`: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, ..."""

        def reached():
            state = self.show(job)["JobState"]
            if state in FINAL and state not in states:
                raise AssertionError(f"{state} instead of {' or '.join(states)}: {self.show(job)}")
            return state if state in states else None

        return wait_for(reached, timeout_s, lambda: f"{' or '.join(states)}: {self.show(job)}")

    def wait_idle(self) -> None:
        """Wait until every node is up and free."""

        def idle():
            states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
            return states.split() == ["idle"] * len(self.nodes)

        wait_for(idle, 60, lambda: f"idle nodes\n{self.run('sinfo', '-N', check=False)}\n{self.logs()}")

    def start_slurmd(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, node=node)

    def kill_slurmd(self, node: str) -> None:
        """The daemon of one node dies; the jobs' processes there go on."""
        self.run("pkill", "-KILL", "-x", "slurmd", node=node)
        self.daemons.pop(node).wait()

    def power_off(self, node: str) -> None:
        """Every process of the node dies at once."""
        os.kill(self.inits.pop(node), 9)
        self.daemons.pop(f"init of {node}").wait()
        self.daemons.pop(node).wait()

    def power_on(self, node: str) -> None:
        self._start_node(node)

    def lose(self, node: str) -> None:
        """The controller takes a node for dead at once, instead of after its timeout."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def logs(self) -> str:
        """The daemons' last lines."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in paths)

    # How it is made

    def _enter(self, node: str | None, cwd: Path = Path("/")) -> list[str]:
        """Into the namespaces of a node (None: the world)."""
        target = f"--target={self.inits[node]}"
        enter = ["nsenter", "--net", "--uts", "--mount", "--pid", "--cgroup", target, f"--wd={cwd}"]
        return [*enter, "env", f"PATH={SEARCH_PATH}", f"SLURM_CONF={self.folder}/slurm.conf"]

    def _write_files(self) -> None:
        folder = self.folder
        names = "".join(f"{self._address(node)} {node}\n" for node in self.nodes)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{CONTROLLER} controller\n{names}")
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (folder / "munge.key").touch(mode=0o600)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "state").mkdir()
        (folder / "cgroup/freezer").mkdir(parents=True)
        (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={folder}/cgroup\n")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-7]\n")
        for device in (folder / f"nvidia{number}" for number in range(8)):
            if subprocess.run(["mknod", device, "c", "1", "3"], capture_output=True).returncode:
                device.touch()  # slurmd grumbles, and takes it

    def _start_world(self) -> None:
        folder = self.folder
        start = ["setpriv", "--pdeathsig", "KILL", "unshare", *_namespaces()]
        self.world = self._first_process([*start, "bash", "-c", WORLD, str(folder), folder.name, INIT])
        self.inits[None] = _child_of(self.world.pid)
        wait_for((folder / "up").exists, 10, "the world's first process is up")
        self._set_up(None, "controller")
        self.run("ip", "link", "add", "bridge", "type", "bridge")
        self.run("ip", "addr", "add", f"{CONTROLLER}/24", "dev", "bridge")
        self.run("ip", "link", "set", "bridge", "up")
        frozen = f" {folder}/cgroup/freezer " in self.run("cat", "/proc/mounts")
        self.proctrack = "cgroup" if frozen else "linuxproc"
        config = {"controller": CONTROLLER, "proctrack": self.proctrack}
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, nodes=len(self.nodes), **config))
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"seed-file": "munge.seed", "log-file": "munge.log"}
        places = [f"--{option}={folder}/{file}" for option, file in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *places)
        wait_for((folder / "munge.socket").exists, 10, lambda: f"munged\n{self.logs()}")
        self._daemon("slurmctld", "slurmctld", "-D", "-i")

    def _start_node(self, node: str) -> None:
        outer = self._first_process([*self._enter(None), "unshare", *_namespaces(), "bash", "-c", INIT])
        self.daemons[f"init of {node}"] = outer
        self.inits[node] = _child_of(_child_of(outer.pid))  # nsenter forks, unshare forks
        self._set_up(node, node)
        self.run("ip", "link", "add", f"to-{node}", "type", "veth", "peer", "name", f"from-{node}")
        into_network = ["nsenter", "--net", f"--target={self.inits[None]}"]
        move = ["ip", "link", "set", f"from-{node}", "netns", str(self.inits[node])]
        subprocess.run([*into_network, *move], check=True, env={"PATH": SEARCH_PATH})
        self.run("ip", "link", "set", f"to-{node}", "master", "bridge", "up")
        self.run("ip", "addr", "add", f"{self._address(node)}/24", "dev", f"from-{node}", node=node)
        self.run("ip", "link", "set", f"from-{node}", "up", node=node)
        self.start_slurmd(node)

    def _address(self, node: str) -> str:
        return f"10.77.0.{self.nodes.index(node) + 1}"

    def _set_up(self, node: str | None, hostname: str) -> None:
        self.run("hostname", hostname, node=node)
        self.run("ip", "link", "set", "lo", "up", node=node)
        for file in ("hosts", "nsswitch.conf"):
            self.run("mount", "--bind", self.folder / file, f"/etc/{file}", node=node)

    def _first_process(self, command: list[str]) -> subprocess.Popen:
        with (self.folder / "namespaces.log").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _daemon(self, name: str, *command: str, node: str | None = None) -> None:
        enter = self._enter(node)
        environment = {"PATH": SEARCH_PATH, "HOME": os.environ.get("HOME", "/")}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [*enter, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )


def _namespaces() -> list[str]:
    return ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _child_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return int(wait_for(lambda: children.read_text().split(), 10, f"a child of process {pid}")[0])


def _remove_groups(pattern: str) -> None:
    """Remove the control groups that the processes of a cluster left; those in use stay."""
    find = f"find /mnt/{pattern} -depth -type d -exec rmdir {{}} +"
    script = f"mount -t cgroup -o freezer freezer /mnt && {find}"
    subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True)
