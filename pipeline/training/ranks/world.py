"""Ranks: the process group, this process's place in it, and what all ranks must agree on."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import TrainConfig
from pipeline.counts import count
from pipeline.errors import GpuFault, TransientError, UserError, permission_problem
from pipeline.gpu_facts import granted_gpus, is_gpu_fault, kernels_problem, sign_of_gpus, why_no_cuda
from pipeline.limits import MOST_FILES, available_cores, open_files_limit, share_of_cores
from pipeline.model.pooling import use_deterministic_pooling
from pipeline.rank_env import find_leftovers, has_launcher, is_beyond_world_size
from pipeline.rank_info import RankInfo
from pipeline.training.ranks.rendezvous import agree_on_name, find_store
from pipeline.training.ranks.stop_request import StopRequest
from pipeline.training.ranks.watchdog import Watchdog

END_TIMEOUT = timedelta(seconds=30)  # of the wait for all ranks before a process ends
LONG_TIMEOUT = timedelta(days=1)  # of what only waits for rank 0; the watch ends it before, where nothing moves
SUSPENDED = timedelta(hours=6)  # for which a job may be suspended and resume in place
LONGEST_S = 365 * 86400.0  # of torch's time-outs, which count in nanoseconds: a few centuries would overflow
STORE_TIMEOUT = timedelta(seconds=10)
_LEAVE_S = 60.0
#: A GPU's fault is the training thread's to report. torch's thread that watches NCCL meets it, too, and by default
#: aborts the process at once (pytorch issue 126544). So `Watchdog.network_failed` looks at the errors of NCCL itself.
_NCCL_THREAD = {"TORCH_NCCL_RETHROW_CUDA_ERRORS": "0", "TORCH_NCCL_TEARDOWN_ON_TIMEOUT": "1"}


@dataclass(frozen=True)
class World(RankInfo):
    """This process among all ranks, and their collectives. `long_timeout_group`: a process group for long waits."""

    watch: Watchdog = field(default_factory=Watchdog, compare=False)
    long_timeout_group: Any = field(default=None, compare=False)

    @property
    def hardware(self) -> str:
        """What this rank computes with, in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU, {count(available_cores(), 'core')}"

    def any(self, flag: bool) -> bool:
        """Is the flag up on any rank? Collective, on the host."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """The highest of all ranks' values. Collective, on the host."""
        highest = torch.tensor([value])
        with self.watch.collective("a question to all"):
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest.item())

    def sum(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64. Collective, on the host."""
        total = torch.tensor(values, dtype=torch.float64)
        with self.watch.collective("the sum of scores"):
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, which pickles. Collective, on the host."""
        values = [value] * self.size
        if self.size > 1:
            with self.watch.collective("the exchange of findings"):
                dist.all_gather_object(values, value, group=self.long_timeout_group)
        return values

    def on_rank_zero(self, function: Callable[[], Any], limit_s: float | None = None) -> Any:
        """Call `function` on rank 0 alone; all ranks get its result, or raise its UserError or TransientError. It may
        take `limit_s` seconds; default: as long as anything."""
        answer: list[Any] = [None]
        if self.is_rank_zero:
            name = function.__name__.replace("_", " ")
            self.watch.phase("rank 0's part" + (f" ({name})" if name != "<lambda>" else ""), limit_s=limit_s)
            try:
                answer = [("result", function())]
            except PermissionError as error:
                answer = [("user", str(permission_problem(error)))]
            except (UserError, TransientError) as error:
                answer = [("user" if isinstance(error, UserError) else "broken", str(error))]
        with self.watch.collective("waiting for rank 0"):
            dist.broadcast_object_list(answer, src=0, group=self.long_timeout_group)
        kind, value = answer[0]
        if kind != "result":
            raise UserError(value) if kind == "user" else TransientError(value, on_all_ranks=True)
        return value

    def wait_for_all(self) -> None:
        """Wait for all ranks, `END_TIMEOUT` at most. Collective, on the host."""
        if self.watch.disconnected:
            return
        self.watch.phase("waiting for the other ranks' end", limit_s=2 * END_TIMEOUT.total_seconds())
        with contextlib.suppress(RuntimeError):  # late, or gone
            dist.all_reduce(torch.zeros(1), async_op=True).wait(timeout=END_TIMEOUT)

    def wait_for_rank_zero(self) -> None:
        """Wait until rank 0 has done what it does alone at the end: the report, the last checkpoint, W&B.

        Collective, and required before `close`: NCCL's groups are destroyed by all ranks together, and a rank that came
        early would count as hung.
        """
        if self.size > 1:
            with self.watch.collective("waiting for rank 0's report and last checkpoint"):
                dist.barrier(group=self.long_timeout_group)

    def close(self, failed: bool = False) -> None:
        """Leave the process group. failed: this rank broke; the others may be anywhere, so nobody waits for them."""
        self.watch.phase("leaving the other ranks", limit_s=_LEAVE_S)
        if not (failed and self.device.type == "cuda"):
            dist.destroy_process_group()
        self.watch.close()


def _device(name: str, local_rank: int) -> torch.device:
    """Where this rank computes. Raises UserError where there should be a GPU and none can be used."""
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        sign = sign_of_gpus()
        if name == "auto" and sign is None:
            return torch.device("cpu")
        though = f", though {sign}" if sign else ""
        raise _of_this_node(
            f"--train.device {name}: no GPU can be used on {socket.gethostname()}{though}: {why_no_cuda()}; "
            "or give --train.device cpu",
            local_rank,
        )
    count = torch.cuda.device_count()
    if count == 1 and _has_own_gpu(local_rank):
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: {count} are visible; start as many processes a node as it has GPUs"
            " (of GPUs that are split by MIG a process sees one instance: start one process)"
        )
    return torch.device("cuda", local_rank)


def _has_own_gpu(local_rank: int) -> bool:
    """Has Slurm given each process a GPU of its own? By --gpus-per-task, which only sbatch says in the environment, or
    by another option of srun, such as --gpu-bind=single:1 or --ntasks-per-gpu: then a task sees one of the node's."""
    if os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1":
        return True
    by_srun = os.environ.get("SLURM_LOCALID") == str(local_rank) and "TORCHELASTIC_RUN_ID" not in os.environ
    return by_srun and granted_gpus() > 1


def _take_gpu(device: torch.device, local_rank: int) -> None:
    """Compute on this GPU from now on. Raises GpuFault, TransientError or UserError, in one line, where that can't
    work: another process holds it, it is broken, or this torch has no kernels for it."""
    where = f"GPU {device.index} on {socket.gethostname()}"
    try:
        torch.cuda.set_device(device)
        torch.empty(1, device=device)  # number 0 is set already, and nothing has asked the GPU yet
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0][:200]
        kind = GpuFault if is_gpu_fault(error) else TransientError
        raise kind(f"{where} can't be used: {said}; does another process hold it? See nvidia-smi") from error
    problem = kernels_problem(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    if problem:
        name = torch.cuda.get_device_name(device)
        raise _of_this_node(f"{where} is a {name}, and {problem}; or give --train.device cpu", local_rank)


def _of_this_node(message: str, local_rank: int) -> UserError:
    """An error that only the ranks of this node meet: the first of them says it."""
    error = UserError(message)
    error.on_all_ranks = local_rank != 0
    return error


def start_world(train: TrainConfig, stop: StopRequest | None = None) -> World:
    """Join the process group that torchrun or srun describes, or one of this process alone.

    Raises UserError for variables of a launcher that is not there, and where the process is in a group already.
    """
    if dist.is_initialized():
        raise UserError("torch.distributed is initialized already; call destroy_process_group() before")
    leftovers = find_leftovers()
    if leftovers:
        error = UserError(leftovers)
        error.on_all_ranks = not is_beyond_world_size()
        raise error
    rank, size, local_rank, local_size = 0, 1, 0, 1
    if has_launcher():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK") or 0)
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    device = _device(train.device, local_rank)
    open_files_limit(MOST_FILES)
    backend = "gloo"
    if device.type == "cuda":
        _take_gpu(device, local_rank)
        backend = "cpu:gloo,cuda:nccl"
        for name, value in _NCCL_THREAD.items():
            os.environ.setdefault(name, value)
    if train.deterministic:
        # Read when cuBLAS and NCCL are first used. NVLink SHARP sums in the switch, in an order of its own.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # The watchdog acts first and names the rank that hangs; unlike torch it notices that this process was suspended.
    limit = max(timedelta(seconds=min(1.5 * train.hang_timeout_s + 30, LONGEST_S)), SUSPENDED)
    try:
        store = find_store(rank, size, limit, train.hang_timeout_s, stop) if size > 1 else dist.HashStore()
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().splitlines()[0][:200]
        raise TransientError(
            f"rank {rank} on {socket.gethostname()} can't meet the others at {where} ({reason}); "
            "is that port free, and not closed by a firewall? Give torchrun another --rdzv-endpoint or --master-port"
        ) from error
    torch.use_deterministic_algorithms(train.deterministic)  # a run before in this process may have wanted the other
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not train.deterministic
        if train.deterministic:
            use_deterministic_pooling()
    long_timeout_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT) if size > 1 else None
    watch = Watchdog(rank, size, train.hang_timeout_s, _shared_store(size))
    if device.type == "cuda" and size > 1:
        watch.network_failed = _look_at_nccl(device)
    cores = _own_cores(rank, size)
    if device.type == "cpu":
        torch.set_num_threads(cores if size > 1 else _wanted_threads(cores))
    return World(rank, size, local_rank, local_size, device, cores, watch, long_timeout_group)


def _wanted_threads(cores: int) -> int:
    """The threads that a process alone computes with: `cores`, or fewer where OMP_NUM_THREADS says so, as of programs
    that share a machine. Of several ranks their launcher sets that variable, mostly to 1."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(cores, int(wanted)) if wanted.isdecimal() and int(wanted) > 0 else cores


def _own_cores(rank: int, size: int) -> int:
    """The cores that this rank may fill with threads; a launcher may have bound it to some of its node. Collective."""
    if size == 1:
        return available_cores()
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or socket.gethostname()
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, (node, sorted(os.sched_getaffinity(0))))
    here = [other for other in range(size) if everyone[other][0] == node]
    return share_of_cores([everyone[other][1] for other in here], here.index(rank))


def _look_at_nccl(device: torch.device) -> Callable[[], bool]:
    """A function that tells, from any thread, whether NCCL has reported an error on this rank."""
    backend: Any = dist.distributed_c10d._get_default_group()._get_backend(device)

    def has_failed() -> bool:
        try:
            return backend.get_error().name != "SUCCESS"
        except (AttributeError, RuntimeError):  # an older torch; a wrapper for debugging
            return False

    return has_failed


def _shared_store(size: int) -> dist.Store | None:
    """A connection of its own to the store by which the ranks found each other; each start has its own keys."""
    if size == 1:
        return None
    name = agree_on_name()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT)
    return dist.PrefixStore(f"watch/{name}", store)


def start_watchdog(world: World) -> None:
    """Learn where each rank runs, for messages, and begin to watch this one. Collective."""
    gpu = f"GPU {world.local_rank}, " if world.device.type == "cuda" else ""
    mine = f"rank {world.rank} ({socket.gethostname()}, {gpu}pid {os.getpid()})"
    if world.size > 1:
        dist.all_gather_object(world.watch.names, mine)
    else:
        world.watch.names[0] = mine
    world.watch.start()


class Clock:
    """Seconds since the last lap; `lap` begins a new one."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.last = now - self.last, now
        return elapsed
