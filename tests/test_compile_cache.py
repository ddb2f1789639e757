"""What torch.compile makes is kept in the run folder, and the next start uses it."""

import os
import subprocess

import pytest
import runs

from pipeline.training.cli import keep_compiled

_PLAIN = ("--model.zero_init_residual", "false", "--train.precision", "fp32")
_NET = """
from torch import nn
def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))
"""


def test_what_the_environment_says_takes_precedence(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"TRITON_CACHE_DIR": "/elsewhere"})
    keep_compiled(tmp_path)
    assert os.environ == {"TRITON_CACHE_DIR": "/elsewhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}


@pytest.mark.long
@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew_and_a_third_may_do_without(root, tmp_path):
    """Without a TMPDIR in common, as where a batch job's end removes it. The losses are those of a run that was never
    compiled, to rounding."""
    (tmp_path / "net.py").write_text(_NET)
    run, whole, libraries = tmp_path / "run", tmp_path / "whole", []

    def start(folder, number, *options):
        (tmp_path / f"tmp{number}").mkdir()
        command = runs.command(root, folder, "--model.name", "net:make", *_PLAIN, *options)
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
