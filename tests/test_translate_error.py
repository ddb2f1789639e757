"""What runs out underneath is one line that says what was asked for, what was there, and what to do."""

import contextlib
import ctypes
import errno
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import nvidia_smi
import pytest
import runs
import torch

from pipeline.config import RawConfig, TrainConfig, load_config, to_yaml
from pipeline.dataset.index.scan import build_index
from pipeline.errors import GpuFault, TransientError, UserError, exit_code_of
from pipeline.loader.source import Source
from pipeline.training.ranks import translate_error as translation
from pipeline.training.ranks.translate_error import largest_fitting_batch, translate_error, translating_errors
from pipeline.training.ranks.watchdog import Watchdog
from pipeline.training.ranks.world import World, start_world

CLONE_NEWNS = 0x20000  # <sched.h>
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
WORLD = World(0, 1, 0, 1, torch.device("cpu"))


def broken(function) -> str:
    """The one line that a rank ends with when `function` breaks."""
    with pytest.raises(TransientError) as error, translating_errors(RawConfig(run_dir="/nowhere").resolve(), WORLD):
        function()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_host_memory(monkeypatch):
    monkeypatch.setattr(translation, "largest_fitting_batch", lambda config, room: f"; {room:.0f} MiB are room")
    line = broken(lambda: torch.empty(1 << 50))
    assert "out of host memory on rank 0: 4194304.0 GiB asked for" in line and "GiB are free; " in line
    assert "Unable to allocate" in broken(lambda: np.empty(1 << 58, np.uint8))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: misaligned address",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "NCCL watchdog: Xid 79: GPU has fallen off the bus",
        "Cuda failure 700 'an illegal memory access was encountered'",
        "Cuda failure 'unspecified launch failure'",
    ],
)
def test_a_fault_of_a_gpu_names_host_card_and_step(tmp_path, monkeypatch, text):
    """The card by UUID and serial number, which an operator looks for; it is not tried again in place."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvidia_smi.install(tmp_path / "bin", monkeypatch, 4)
    world = World(1, 2, 1, 2, torch.device("cuda", 1))
    world.watch.names[:] = ["rank 0 (n16, GPU 0, pid 6)", "rank 1 (n17, GPU 1, pid 7)"]
    world.watch.step = 4711
    with pytest.raises(GpuFault) as error, translating_errors(RawConfig(run_dir="/nowhere").resolve(), world):
        raise RuntimeError(f"{text}\nCUDA kernel errors might be asynchronously reported")
    line = str(error.value)
    assert "\n" not in line and text in line
    assert all(word in line for word in ("n17", "GPU-00001aaa", "serial 1652923000001", "step 4711", "nvidia-smi"))
    assert exit_code_of(error.value) == 71


def test_a_gpu_that_slurm_has_bound_to_one_task_is_named(tmp_path, monkeypatch):
    """Rank 3 of a node sees one GPU, which is number 0 in its process."""
    nvidia_smi.install(tmp_path / "bin", monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    world = World(3, 4, 3, 4, torch.device("cuda", 0))
    world.watch.names[:] = [f"rank {number} (n16, GPU {number})" for number in range(4)]
    line = translate_error(RuntimeError("CUDA error: misaligned address"), RawConfig().resolve(), world)
    assert "GPU-00003aaa" in line and "serial 1652923000003" in line


def test_a_network_without_deterministic_kernels_is_the_users_to_change():
    """The warm-up meets it, before the first step."""
    text = "upsample_bilinear2d_backward_out_cuda does not have a deterministic implementation, but you set ..."
    with pytest.raises(UserError) as error, translating_errors(RawConfig().resolve(), WORLD):
        raise RuntimeError(text)
    line = str(error.value)
    assert line.startswith("--train.deterministic: upsample_bilinear2d_backward_out_cuda, which ") and "\n" not in line
    assert "give --train.deterministic false" in line


def nccl_error(last: str) -> torch.distributed.DistBackendError:
    """As torch words it."""
    return torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
        f"Last error:\n{last}"
    )


def test_a_gpu_fault_that_nccl_meets_is_one_of_the_gpu(tmp_path, monkeypatch):
    nvidia_smi.install(tmp_path / "bin", monkeypatch, 1)
    config = RawConfig(run_dir=str(tmp_path)).resolve()
    with pytest.raises(GpuFault, match="GPU fault on rank 0") as error, translating_errors(config, WORLD):
        raise nccl_error("Cuda failure 719 'unspecified launch failure'")
    assert ": Cuda failure 719 'unspecified launch failure'; see" in str(error.value)
    assert "unspecified launch failure" in (tmp_path / "gpu_fault").read_text()


@pytest.mark.parametrize("last", ["Cuda failure 2 'out of memory'", "Failed to CUDA calloc async 608 bytes"])
def test_no_memory_for_nccl(monkeypatch, last):
    monkeypatch.setattr(translation, "_shm_free", lambda: 1 << 40)

    def fail():
        raise nccl_error(last)

    line = broken(fail)
    assert line.startswith("out of GPU memory on rank 0") and "--train.micro_batch_size" in line


@pytest.mark.parametrize(
    "last",
    [
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        "Multiple Ranks are using the same GPU/Partition. Set NCCL_MULTI_RANK_GPU_ENABLE=1 to enable this",
    ],
)
def test_ranks_on_one_gpu_are_the_users_to_change(monkeypatch, last):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="on the same GPU") as error, translating_errors(RawConfig().resolve(), WORLD):
        raise nccl_error(last)
    assert "as many processes a node as it has GPUs (CUDA_VISIBLE_DEVICES=0 on " in str(error.value)


def test_what_nccl_says_of_the_network_is_passed_on(monkeypatch):
    monkeypatch.setattr(translation, "_shm_free", lambda: 1 << 40)
    line = translate_error(nccl_error("Call to ibv_reg_mr failed"), RawConfig().resolve(), WORLD)
    assert "contact to the other ranks was lost" in line and "(NCCL: Call to ibv_reg_mr failed)" in line


def test_no_memory_for_cuda_itself(tmp_path, monkeypatch):
    nvidia_smi.install(tmp_path / "bin", monkeypatch, 1)
    line = translate_error(RuntimeError("CUDA error: out of memory\n..."), RawConfig().resolve(), WORLD)
    assert line.startswith("out of GPU memory on rank 0") and "another process" in line


def test_gpu_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of ...")
    line = translate_error(error, RawConfig().resolve(), replace(WORLD, device=torch.device("cuda", 0)))
    assert line == "out of GPU memory on rank 0: 20.50 GiB asked for, 3.0 of its 80.0 GiB are free"


def test_the_batch_that_fits_is_asked_of_estimate(tmp_path):
    config = load_config(runs.TINY, ["--run_dir", str(tmp_path)])
    assert "--card_mib 6000" in largest_fitting_batch(config, 6000)  # there is no saved configuration yet: how to ask
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    line = largest_fitting_batch(config, 6000)
    batch = int(line.rsplit(" or less", 1)[0].rsplit(" ", 1)[1])
    assert batch > 1 and f"at most {batch:,} images at once: give --train.micro_batch_size {batch} or less" in line


@contextlib.contextmanager
def few_file_handles():
    """As many as are open now, and no more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), before[1]))
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.dup(0))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_too_few_file_handles_are_no_bad_image(root):
    """They end the run: the images are not substituted, as unreadable ones are."""
    source = Source(build_index(root).splits["train"])
    source.threads.pool.submit(int).result()
    with few_file_handles(), pytest.raises(OSError) as error:
        source.read_batch(np.arange(8))
    source.close()
    assert error.value.errno == errno.EMFILE
    assert "too few file handles" in translate_error(error.value, RawConfig().resolve(), WORLD)
    assert "ulimit -n" in translate_error(error.value, RawConfig().resolve(), WORLD)


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(TransientError, match=rf"127.0.0.1:{port} .*--rdzv-endpoint or --master-port"):
            start_world(TrainConfig(device="cpu"))


def in_a_container(function):
    """What `function` returns in a mount namespace whose /dev/shm has 1 MiB: a thread's own, gone with it."""

    def inside():
        if ctypes.CDLL(None).unshare(CLONE_NEWNS):
            return None
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True)
        return function()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(inside).result()


@AS_ROOT
def test_small_shared_memory():
    error = torch.distributed.DistBackendError("NCCL error: unhandled system error")
    line = in_a_container(lambda: translate_error(error, RawConfig().resolve(), WORLD)) or pytest.skip(
        "no mount namespace to be had"
    )
    assert "/dev/shm has 1 MiB free" in line and "--shm-size" in line
    assert "/dev/shm" not in translate_error(error, RawConfig().resolve(), WORLD)


def test_shared_memory_that_fills_up_while_a_run_trains_is_not_what_nccl_lacked(monkeypatch):
    """Snapshots fill it; NCCL takes its part at the start, or none where it is told so."""
    monkeypatch.setattr(translation, "_shm_free", lambda: 1 << 20)
    trains = replace(WORLD, watch=Watchdog())
    trains.watch.phase("training", 7)
    for world, disabled in ((trains, "0"), (WORLD, "1")):
        monkeypatch.setenv("NCCL_SHM_DISABLE", disabled)
        line = translate_error(nccl_error("remote process exited"), RawConfig().resolve(), world)
        assert "contact to the other ranks was lost" in line and "shared memory" not in line
    monkeypatch.delenv("NCCL_SHM_DISABLE")
    assert "shared memory is short" in translate_error(nccl_error("unknown"), RawConfig().resolve(), WORLD)


@AS_ROOT
def test_a_process_that_the_kernel_killed_for_memory_is_told_of():
    """A cgroup of 20 MB; its rank has died, as far as the others can see."""
    group = Path("/sys/fs/cgroup/memory") / f"tests-{os.getpid()}"
    if not group.parent.is_dir():
        pytest.skip("needs cgroup v1's memory")
    error = RuntimeError("Connection closed by peer")
    assert "killed" not in translate_error(error, RawConfig().resolve(), WORLD)
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("20000000")
        program = f"open('{group}/cgroup.procs', 'w').write('0'); bytearray(1 << 28)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    finally:
        group.rmdir()
    line = translate_error(error, RawConfig().resolve(), WORLD)
    assert (
        line.startswith("before the first step: contact")
        and "has killed 1 since the start because host memory ran out" in line
    )


@contextlib.contextmanager
def little_memory():
    """Too little for another thread's stack."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_too_little_memory_is_no_bad_image(root):
    """It ends the run in one line, though it came up amid DALI's decoding."""
    pytest.importorskip("nvidia.dali")
    from pipeline.loader.decode.dali import DaliDecoder

    source = Source(build_index(root).splits["train"])
    decoder = DaliDecoder(8, 1, torch.device("cpu"))
    source.threads.hurry(more=True)  # several threads are to read

    def batches():
        with little_memory():
            yield source.read_batch(np.arange(8))

    line = broken(lambda: next(decoder.decode(batches())))
    source.close()
    decoder.close()
    assert "out of host memory on rank 0: " in line and "can't start new thread" in line and "ulimit -u" in line


def test_a_user_error_and_the_unknown_stay_what_they_are():
    for error in (UserError("give another"), ZeroDivisionError("?"), RuntimeError("shapes [2] and [3] differ")):
        with pytest.raises(type(error), match=re.escape(str(error))), translating_errors(RawConfig().resolve(), WORLD):
            raise error


@AS_ROOT
def test_a_full_tmp_and_a_full_shm_do_not_matter(root, tmp_path):
    """W&B and torch keep their scratch files there; two ranks on CPUs share no memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], check=True)
    try:
        with contextlib.suppress(OSError):
            (tmp_path / "full").write_bytes(bytes(1 << 20))
        run = root.parent / "run-with-full-tmp"
        options = ["--train.max_steps", "2", "--tracking.wandb", "offline"]
        full = 'mount -t tmpfs -o size=4k tmpfs /dev/shm; echo > /dev/shm/full; exec "$@"'
        command = runs.command(root, run, *options, processes=2)
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", full, "bash", *command],
            env=runs.environment() | {"TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and len(runs.rows(run, "train")) == 2, done.stdout + done.stderr
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
