"""A GPU that fails is not tried again: not in place by torchrun, and the ledger says so."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import runs
import torch

from pipeline.__main__ import VERBS, main
from pipeline.config import RawConfig, TrainConfig
from pipeline.errors import EXIT_GPU_FAULT, EXIT_RETRY, GpuFault, TransientError
from pipeline.training import loop
from pipeline.training.ranks import world
from pipeline.training.ranks.world import World
from pipeline.training.run_folder import gpu_fault


@pytest.mark.slow
def test_torchrun_starts_nobody_again_on_the_same_gpu(root, tmp_path):
    """Its restarts end at once, with the fault's own line; the next start enters it into the ledger."""
    run = tmp_path / "run"
    options = ["--checkpoint.every_steps", "2", "--train.max_steps", "4"]
    command = runs.command(root, run, *options, processes=2, program=["-m", "tests.inject", "gpu", "1", "3"])
    command.insert(command.index("torch.distributed.run") + 1, "--max-restarts=2")
    done = runs.run(command)
    assert done.returncode == 1 and f"exitcode  : {EXIT_GPU_FAULT}" in done.stderr, done.stderr[-3000:]
    assert done.stderr.count("pipeline train: not started again on ") == 2
    steps = [row["step"] for row in runs.rows(run, "train")]
    assert steps == [1, 2, 3] and len(runs.rows(run, "event")) == 1  # no restart has trained
    fault = json.loads((run / "gpu_fault").read_text())
    assert (fault["rank"], fault["step"]) == (1, 4) and "uncorrectable ECC" in fault["message"]
    runs.train(root, run, *options, processes=2)
    names = [row["event"] for row in runs.rows(run, "event")]
    assert names == ["started", "gpu_fault", "resumed", "finished"]
    (event,) = (row for row in runs.rows(run, "event") if row["event"] == "gpu_fault")
    assert event["fault_step"] == 4 and event["excluded"] is False and not (run / "gpu_fault").exists()


@pytest.mark.parametrize(
    ("now", "refused"),
    [
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, False),  # somebody has started it again
        ({"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "other"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "SLURM_RESTART_COUNT": "1"}, False),  # requeued
        ({"TORCHELASTIC_RESTART_COUNT": "1", "SLURMD_NODENAME": "n2"}, True),  # torchrun starts all or none
        ({"TORCHELASTIC_RESTART_COUNT": "1", "PIPELINE_LAUNCH_ROUND": "2"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "PIPELINE_LAUNCH_ROUND": "2", "PIPELINE_LAUNCH_JOB": "next"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1", "PIPELINE_LAUNCH_ROUND": "2", "SLURMD_NODENAME": "n2"}, False),
    ],
)
def test_who_is_refused_after_a_fault(tmp_path, monkeypatch, now, refused):
    """`pipeline launch` leaves the node out; where the rank was killed before it could say so, it does not know yet."""
    for name in ("PIPELINE_LAUNCH_ROUND", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    gpu_fault.record_gpu_fault(tmp_path, 3, 12, "GPU fault on rank 3")
    for name, value in now.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(GpuFault, match="not started again on n1, where GPU fault on rank 3"):
            gpu_fault.refuse_restart_in_place(tmp_path)
    else:
        gpu_fault.refuse_restart_in_place(tmp_path)
    assert gpu_fault.take_gpu_fault(tmp_path)["fault_node"] == "n1" and gpu_fault.take_gpu_fault(tmp_path) is None


def test_the_fault_is_noted_before_anything_is_closed(tmp_path, monkeypatch):
    """Closing waits for the disk and for W&B, and the launcher may end the process meanwhile."""
    seen = []

    class Trainer:
        def run(self):
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

        def close(self):
            seen.append((tmp_path / "gpu_fault").exists())

    config = RawConfig(run_dir=str(tmp_path)).resolve()
    monkeypatch.setattr(loop, "already_finished", lambda setup: False)
    monkeypatch.setattr(loop, "open_trainer", lambda setup: Trainer())
    with pytest.raises(RuntimeError, match="uncorrectable ECC"):
        loop.train(SimpleNamespace(config=config, world=World(0, 1, 0, 1, torch.device("cpu"))))
    assert seen == [True]


def test_torchs_thread_that_watches_nccl_does_not_abort_the_process(monkeypatch):
    """It meets a GPU's fault within a tenth of a second, and would leave neither the marker nor the exit code 71."""
    found = {}

    def join(*_, **__):
        found.update(os.environ)
        raise torch.distributed.DistError("far enough")

    names = ("TORCH_NCCL_RETHROW_CUDA_ERRORS", "TORCH_NCCL_TEARDOWN_ON_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")  # put back at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(world, "_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(world, "_take_gpu", lambda *_: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    with pytest.raises(TransientError, match="far enough"):
        world.start_world(TrainConfig())
    assert [found.get(name) for name in names] == ["0", "1"]


PROGRAM = """
import os, sys, time
from pathlib import Path
from pipeline.training.run_folder import gpu_fault
folder = Path(sys.argv[1])
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if not (folder / "gpu_fault").exists():
        gpu_fault.record_gpu_fault(folder, 0, 1, "a fault")
    sys.exit(1)
gpu_fault.refuse_restart_in_place(folder)
"""


def test_a_fault_of_a_launch_before_refuses_nobody(tmp_path):
    """Outside Slurm all launches by torchrun have the same run id. A script stands between torchrun and the ranks."""
    (tmp_path / "program.py").write_text(PROGRAM)
    script = tmp_path / "wrapper.sh"
    script.write_text(f"#!/bin/sh\n{sys.executable} {tmp_path / 'program.py'} {tmp_path}\nexit $?\n")
    script.chmod(0o755)
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--no-python", str(script)]
    found = [runs.run(command) for _ in range(2)]
    assert found[0].returncode == 1 and "not started again on" in found[0].stderr, found[0].stderr[-3000:]
    assert found[1].returncode == 0, found[1].stderr[-3000:]


@pytest.mark.parametrize(("verb", "remedy"), [("evaluate", "a smaller --batch_size"), ("estimate", "another GPU")])
def test_too_little_gpu_memory_is_one_line_of_every_verb(verb, remedy, monkeypatch, capsys):
    def run(_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 3.06 GiB. GPU 0 has a total capacity of 14.58 GiB of which 1.37 GiB "
            "is free. Process 1 has 13.20 GiB memory in use. Of the allocated memory 12.9 GiB is allocated by PyTorch."
        )

    module, function, _ = VERBS[verb]
    monkeypatch.setattr(f"{module}.{function}", run)
    assert main([verb]) == EXIT_RETRY
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pipeline {verb}: out of GPU memory (Tried to allocate 3.06 GiB. GPU 0 has a total")
    assert f"of which 1.37 GiB is free); give {remedy}" in line
