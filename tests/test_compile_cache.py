"""What torch.compile makes is kept in the run folder, and the next start uses it."""

import contextlib
import os
import subprocess

import pytest
import runs
from torch._inductor.runtime import cache_dir_utils

from pipeline import load_config
from pipeline.errors import UserError
from pipeline.training import cli
from pipeline.training.ranks.stop_request import StopRequest

_PLAIN = ("--model.zero_init_residual", "false", "--train.precision", "fp32")
_NET = """
from torch import nn
def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
"""


@pytest.mark.parametrize("triton", ["/elsewhere", None])
@pytest.mark.parametrize("compiled_before", [False, True])
def test_each_run_of_a_process_has_its_own_cache_and_what_the_user_says_stays(
    monkeypatch, tmp_path, compiled_before, triton
):
    """compiled_before: torch has set the variables to its own default."""
    seen = []

    def start(config, *_):
        seen.append({name: os.environ[name] for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")})
        if len(seen) == 1:
            raise UserError("broken off")

    monkeypatch.setattr(cli, "_train_config", start)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    if compiled_before:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache_dir_utils.default_cache_dir())
        monkeypatch.setenv("TRITON_CACHE_DIR", cache_dir_utils.triton_cache_dir(0))
    if triton:
        monkeypatch.setenv("TRITON_CACHE_DIR", triton)
    before = dict(os.environ)
    for name in "ab":
        config = load_config("smoke", {"run_dir": tmp_path / name, "train.compile": True})
        with contextlib.suppress(UserError):
            cli.train_config(config, StopRequest(install=False))
        assert os.environ == before
    found = [(one["TORCHINDUCTOR_CACHE_DIR"], one["TRITON_CACHE_DIR"]) for one in seen]
    caches = [tmp_path / name / "compile_cache" for name in "ab"]
    assert found == [(str(cache / "inductor"), triton or str(cache / "triton")) for cache in caches]


@pytest.mark.long
@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew_and_a_third_may_do_without(root, tmp_path):
    """Without a TMPDIR in common, as where a batch job's end removes it. The losses are those of a run that was never
    compiled, to rounding. On one core: what is compiled for a CPU is for its number of cores, which a control group
    may change meanwhile."""
    (tmp_path / "net.py").write_text(_NET)
    run, whole, libraries = tmp_path / "run", tmp_path / "whole", []

    def start(folder, number, *options):
        (tmp_path / f"tmp{number}").mkdir()
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0)))]
        command += runs.command(root, folder, "--model.name", "net:make", *_PLAIN, *options)
        own = {"TMPDIR": str(tmp_path / f"tmp{number}"), "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(command, env=runs.environment() | own, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]

    for number in (1, 2):
        start(run, number, "--train.compile", "--train.max_steps", str(2 * number))
        libraries.append({path.name for path in (run / "compile_cache/inductor").rglob("*.so")})
    assert libraries[0] and libraries[1] == libraries[0], sorted(libraries[1] ^ libraries[0])
    start(run, 3, "--train.max_steps", "6")
    start(whole, 4, "--train.max_steps", "6")
    losses = [[row["loss"] for row in runs.rows(folder, "train")] for folder in (run, whole)]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-3)
