"""A GPU that fails is not tried again: not in place by torchrun, and the ledger says so."""

import json

import pytest
import runs

from pipeline.errors import EXIT_GPU_FAULT


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
