"""Every shell script of the project passes shellcheck."""

import shutil
import subprocess
from pathlib import Path

import pytest

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
