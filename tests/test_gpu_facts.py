"""GPUs that can't be used are never passed over in silence: nvidia-smi, drivers, Slurm's grants, limits of a node."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import nvidia_smi
import pytest
import torch

from pipeline import gpu_facts
from pipeline.config import parse_config
from pipeline.errors import GpuFault, TransientError, UserError, complain
from pipeline.gpu_facts import (
    builds_problem,
    cuda_builds,
    driver_problem,
    granted_gpus,
    kernels_problem,
    query_gpus,
    sign_of_gpus,
    smi_problem,
    visible_gpus,
)
from pipeline.insight.preflight.hardware import check_gpus, check_open_files
from pipeline.insight.preflight.node_facts import gather_facts
from pipeline.limits import files_needed
from pipeline.training.ranks import world

SLURM = (
    "SLURM_LOCALID",
    "TORCHELASTIC_RUN_ID",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
    "CUDA_VISIBLE_DEVICES",
)


@pytest.fixture(autouse=True)
def outside_a_job(monkeypatch):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    return lambda count=8, **changes: nvidia_smi.install(tmp_path / "bin", monkeypatch, count, **changes)


@pytest.fixture
def without_cuda(monkeypatch):
    """As torch is where the driver is too old for it: no GPU, and no error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(world, "sign_of_gpus", lambda: sign_of_gpus(Path("/dev/no-such-gpu")))


def test_what_nvidia_smi_says(smi):
    smi(2)
    gpus, driver = query_gpus()
    assert driver == "580.95.05" and [gpu.memory_mib for gpu in gpus] == [81559, 81559]
    assert gpus[1].uuid.startswith("GPU-00001aaa") and gpus[1].serial == "1652923000001"
    assert gpus[1].bus_id == "00000000:17:00.0"


@pytest.mark.parametrize("memory", ["[N/A]", "[Insufficient Permissions]", "[Unknown Error]"])
def test_memory_that_nvidia_smi_does_not_tell(smi, memory):
    smi(1, memory_total=memory, serial="[N/A]")
    (gpu,), _ = query_gpus()
    assert gpu.memory_mib is None and gpu.serial == ""


def test_an_nvidia_smi_that_does_not_know_all_fields(smi):
    smi(4, mig_mode_current=None, serial=None)
    gpus, driver = query_gpus()
    assert len(gpus) == 4 and gpus[0].memory_mib == 81559 and driver == "580.95.05" and not gpus[0].mig


def test_an_nvidia_smi_that_hangs_in_the_driver_is_not_waited_for(tmp_path, monkeypatch):
    """Not even SIGKILL ends it."""
    hangs = tmp_path / "nvidia-smi"
    hangs.write_text("#!/bin/sh\nexec sleep 20\n")
    hangs.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_facts, "_LIMIT_S", 0.2)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: None)
    begun = time.monotonic()
    assert query_gpus() == ([], None) and "no answer within" in (smi_problem() or "")
    assert time.monotonic() - begun < 15


def test_cuda_visible_devices(smi):
    smi(4)
    gpus, _ = query_gpus()

    def numbers(wanted):
        return [gpus.index(gpu) for gpu in visible_gpus(gpus, wanted)]

    assert numbers(None) == [0, 1, 2, 3]
    assert numbers("2,0") == [2, 0]
    assert numbers(f"{gpus[3].uuid},GPU-00001") == [3, 1]
    assert numbers("0,9,1") == [0]  # CUDA ends at the first that is not there
    assert numbers("") == numbers("-1") == numbers("NoDevFiles") == []
    (instance,) = visible_gpus(gpus, "MIG-41b3-7fa0")
    assert instance.mig and instance.memory_mib is None


@pytest.mark.parametrize(
    ("variables", "granted"),
    [
        ({}, 0),
        ({"SLURM_GPUS_ON_NODE": "8"}, 8),
        ({"SLURM_GPUS_PER_TASK": "4"}, 4),
        ({"SLURM_GPUS_PER_TASK": "h100:2"}, 2),
        ({"SLURM_STEP_GPUS": "0,3"}, 2),
        ({"SLURM_GPUS_ON_NODE": "1", "SLURM_GPUS_PER_TASK": "h100:4"}, 1),
    ],
)
def test_what_slurm_granted(variables, granted):
    assert granted_gpus(variables) == granted


@pytest.mark.parametrize(
    ("driver", "cuda", "fits"),
    [
        ("550.54.15", "13.2", False),
        ("580.65.06", "13.2", True),
        ("595.10", "13.2", True),
        ("550.54.15", "12.8", True),
        ("525.60.13", "12.8", True),
        ("470.82.01", "12.0", False),
    ],
)
def test_drivers_against_cuda(driver, cuda, fits):
    problem = driver_problem(driver, {"torch": cuda})
    assert (problem is None) == fits
    assert fits or (driver in problem and f"CUDA {cuda}" in problem)


def test_the_cuda_versions_of_what_is_installed():
    builds = cuda_builds()
    assert builds.get("torch") == torch.version.cuda
    assert builds_problem({"torch": "13.2", "NCCL": "12"}) and not builds_problem({"torch": "13.2", "NCCL": "13"})


def test_auto_takes_a_cpu_only_where_there_is_no_gpu(without_cuda, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert world._device("auto", 0) == torch.device("cpu")


def test_auto_refuses_the_cpu_under_an_old_driver(without_cuda, smi, monkeypatch):
    smi(8, driver_version="550.54.15")
    monkeypatch.setattr("pipeline.gpu_facts.cuda_builds", lambda: {"torch": "13.2"})
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError) as found:
        world._device("auto", 0)
    text = str(found.value)
    assert "\n" not in text and all(word in text for word in ("Slurm granted 8", "550.54.15", "13.2", "580.65"))
    assert "--train.device cpu" in text
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    with pytest.raises(UserError, match="nvidia-smi lists 8"):
        world._device("auto", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user's own wish
    assert world._device("auto", 0) == torch.device("cpu")


BROKEN = {
    "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.86": 18,
    "Unable to determine the device handle for GPU1: 0000:3B:00.0: Unknown Error": 15,
}


@pytest.mark.parametrize("says", BROKEN)
def test_what_nvidia_smi_says_where_it_fails_is_passed_on(says, without_cuda, tmp_path, monkeypatch):
    nvidia_smi.install_broken(tmp_path / "bin", monkeypatch, says, BROKEN[says])
    monkeypatch.setattr("pipeline.gpu_facts.cuda_builds", lambda: {"torch": "13.2"})
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    first = says.splitlines()[0]
    with pytest.raises(UserError) as found:
        world._device("auto", 0)
    assert f"nvidia-smi fails ({first}); ask " in str(found.value) and "\n" not in str(found.value)
    row = check_gpus([facts_of(monkeypatch)], parse_config([]))
    assert row.level == "FAIL" and f"which fails ({first}), though Slurm granted 8" in row.text


def test_preflight_says_what_train_will_where_a_driver_is_broken_outside_slurm(tmp_path, monkeypatch):
    nvidia_smi.install_broken(tmp_path / "bin", monkeypatch, next(iter(BROKEN)), 18)
    facts = facts_of(monkeypatch) | {"sign_of_gpus": "/dev/nvidia0 exists"}
    row = check_gpus([facts], parse_config([]))
    assert row.level == "FAIL" and "version mismatch), though /dev/nvidia0 exists" in row.text


def test_auto_refuses_the_cpu_where_there_is_a_device_file(tmp_path, monkeypatch):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("PATH", "/nowhere")
    assert sign_of_gpus(tmp_path / "nvidia0") == f"{tmp_path / 'nvidia0'} exists"
    assert sign_of_gpus(tmp_path / "nvidia1") is None


def test_a_fault_of_one_node_is_said_by_its_first_rank_alone(without_cuda, smi, monkeypatch, capsys):
    smi(8, driver_version="550.54.15")
    for rank, local_rank in ((8, 0), (9, 1)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 16), ("MASTER_ADDR", "n1"), ("MASTER_PORT", 1)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError) as found:
            world._device("cuda", local_rank)
        complain("pipeline train", found.value)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("pipeline train: rank 8: ")


def test_a_gpu_for_each_task(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="local rank 3 has no GPU"):
        world._device("auto", 3)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "h100:1")
    assert world._device("auto", 3) == torch.device("cuda", 0)


def test_a_task_that_srun_has_bound_to_one_gpu_of_the_node(monkeypatch):
    """What tasks of Slurm 22.05 find with `srun --gpus-per-task=1`, `--gpu-bind=single:1` and `--ntasks-per-gpu=1`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"GPUS_ON_NODE": "2", "STEP_GPUS": "1", "JOB_GPUS": "0,1", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert world._device("auto", 1) == torch.device("cuda", 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # the ranks of torchrun share what its one task sees
    monkeypatch.setenv("SLURM_LOCALID", "0")
    with pytest.raises(UserError, match="local rank 1 has no GPU"):
        world._device("auto", 1)


@pytest.mark.parametrize(
    ("capability", "kernels", "fits"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"], False),  # V100 under torch for CUDA 13
        ((6, 0), ["sm_70", "sm_75"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # code for 8.0 runs on all of 8.x
        ((8, 0), ["sm_86", "sm_90"], False),
        ((10, 3), ["sm_90", "sm_100"], True),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),  # not known
        ((), ["sm_90"], True),
    ],
)
def test_kernels_for_a_gpu(capability, kernels, fits):
    problem = kernels_problem(capability, kernels)
    assert (problem is None) == fits
    assert fits or f"capability {capability[0]}.{capability[1]}" in problem


def refuse(message: str):
    def fail(*_, **__):
        raise RuntimeError(f"{message}\nCUDA kernel errors might be asynchronously reported")

    return fail


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", GpuFault),
        ("CUDA error: out of memory", TransientError),
    ],
)
@pytest.mark.parametrize("function", ["cuda.set_device", "empty"])
def test_a_gpu_that_cannot_be_taken_is_one_line(message, kind, function, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(f"torch.{function}", refuse(message))
    with pytest.raises(TransientError) as found:
        world._take_gpu(torch.device("cuda", 3), 3)
    assert type(found.value) is kind
    assert "\n" not in str(found.value) and "GPU 3 on" in str(found.value) and message in str(found.value)


def test_a_gpu_that_torch_has_no_kernels_for_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120"])
    with pytest.raises(UserError, match=r"is a Tesla V100-SXM2-16GB, and .* 7\.0 \(it has 7\.5 to 12\.0\)") as found:
        world._take_gpu(torch.device("cuda", 0), 0)
    assert found.value.on_all_ranks is False


def test_preflight_on_old_gpus(smi, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    smi(2, name="Tesla T4", compute_cap="7.5")
    facts = facts_of(monkeypatch)
    for capability, precision, level in (
        ([7, 5], "bf16", "WARN"),
        ([7, 5], "fp16", "pass"),
        ([7, 0], "fp16", "FAIL"),
        ([9, 0], "bf16", "pass"),
        ([], "bf16", "pass"),
    ):
        assert facts["gpus"][1]["capability"] == [7, 5]
        other = facts | {"gpus": [gpu | {"capability": capability} for gpu in facts["gpus"]]}
        row = check_gpus([other], parse_config(["--train.precision", precision]))
        assert row.level == level, row
        assert level == "pass" or "Tesla T4" in row.text


def facts_of(monkeypatch, builds=None) -> dict:
    monkeypatch.setattr("pipeline.insight.preflight.node_facts.cuda_builds", lambda: builds or {"torch": "13.2"})
    return gather_facts(parse_config([]))


def test_preflight_names_the_node_with_the_old_driver(smi, monkeypatch):
    smi(8)
    good = facts_of(monkeypatch)
    assert check_gpus([good], parse_config([])).level == "pass"
    smi(8, driver_version="550.54.15")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    bad = facts_of(monkeypatch) | {"node": "n17"}
    for config in (parse_config([]), parse_config(["--train.device", "cuda"])):
        row = check_gpus([good, bad], config)
        assert row.level == "FAIL" and all(word in row.text for word in ("n17", "550.54.15", "13.2", "580.65"))
    on_a_cpu = parse_config(["--train.device", "cpu", "--train.precision", "fp32"])
    assert check_gpus([good, bad], on_a_cpu).level == "pass"


def test_preflight_on_a_driver_that_is_too_old_for_dali_alone(smi, monkeypatch):
    smi(8, driver_version="470.82.01")
    row = check_gpus([facts_of(monkeypatch, {"torch": "11.8", "DALI": "12"})], parse_config([]))
    assert row.level == "FAIL" and "too old for DALI" in row.text


def test_preflight_counts_the_gpus_that_a_job_may_use(smi, monkeypatch):
    smi(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00003,GPU-00005")
    facts = facts_of(monkeypatch)
    assert len(facts["gpus"]) == 2
    assert check_gpus([facts], parse_config([])).text.startswith("2 x NVIDIA H100")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert (
        "2 GPUs seen by nvidia-smi, though Slurm granted 4"
        in check_gpus([facts_of(monkeypatch)], parse_config([])).text
    )


def test_preflight_on_gpus_that_mig_splits(smi, monkeypatch):
    smi(1, mig_mode_current="Enabled", memory_total="[N/A]")
    row = check_gpus([facts_of(monkeypatch)], parse_config([]))
    assert row.level == "WARN" and "MIG" in row.text
    smi(2, mig_mode_current="Enabled")
    assert check_gpus([facts_of(monkeypatch)], parse_config([])).level == "FAIL"


def test_the_number_of_connections_of_many_ranks():
    node = {"node": "n3", "open_files": 1024}
    assert check_open_files([node], 8).level == "pass"
    row = check_open_files([{"node": "n1", "open_files": -1}, node], 512)
    assert row.level == "FAIL" and "n3" in row.text and "1,024" in row.text and files_needed(512) > 1022


def test_a_rank_raises_its_limit_of_open_files_and_asks_for_deterministic_libraries():
    """As `start_world` does, in a process whose soft limit is the common 1,024."""
    program = (
        "import os, resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "from pipeline.config import parse_config\n"
        "from pipeline.training.ranks.world import start_world\n"
        "start_world(parse_config(['--train.device', 'cpu', '--train.deterministic']).train)\n"
        "assert os.environ['NCCL_NVLS_ENABLE'] == '0' and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert int(done.stdout.splitlines()[-1]) == (min(hard, 1 << 20) if hard >= 0 else 1 << 20)
