"""Every shell script of the project passes shellcheck."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    [
        ROOT / ".ci/run",
        *ROOT.glob("scripts/*.sh"),
        *ROOT.glob("benchmarks/*.sh"),
        *ROOT.glob("slurm/**/*.sh"),
        *ROOT.glob("slurm/*.env.example"),
    ]
)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="no shellcheck: scripts/install_test_tools.sh installs it"
)
def test_shellcheck():
    assert len(SCRIPTS) > 3
    paths = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    done = subprocess.run(["shellcheck", "--external-sources", *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_batch_scripts_are_bash_and_carry_their_options():
    """sbatch reads the #SBATCH lines only up to the first command."""
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
        if options:
            assert lines[0] == "#!/bin/bash", path
            assert all(line.startswith("#") or not line.strip() for line in lines[: options[-1]]), path


@pytest.mark.parametrize("gpus", [0, 1, 3, 6, 8, 40])
def test_quickstart_starts_as_many_processes_as_its_batch_can_be_divided_by(gpus):
    script = (ROOT / "scripts/quickstart.sh").read_text()
    lines = script.partition("\nprocesses=")[1:]
    count = "".join(lines).partition("\n\n")[0] + "\necho $processes"
    done = subprocess.run(["bash", "-euc", f"gpus={gpus}\n{count}"], capture_output=True, text=True, check=True)
    processes = int(done.stdout)
    assert 1 <= processes <= max(gpus, 2)
    assert parse_config(["--config", "smoke"]).train.global_batch_size % processes == 0
