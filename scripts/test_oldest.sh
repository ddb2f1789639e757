#!/usr/bin/env bash
# The quick tests with the oldest versions that pyproject.toml allows of the packages it names (torch, DALI, W&B, ...),
# in an environment of its own, .venv-oldest. Other packages are the newest that fit.
# Usage: scripts/test_oldest.sh [pytest's arguments]        for example -m "not slurm" tests/test_launch.py
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh
venv=$PWD/.venv-oldest

oldest() { # the dependencies, each pinned to its lower bound, with the patches that came for it
    "$venv/bin/python" - <<'EOF'
import tomllib

with open("pyproject.toml", "rb") as file:
    for dependency in tomllib.load(file)["project"]["dependencies"]:
        requirement, _, marker = dependency.partition(";")
        name, _, bound = requirement.strip().partition(">=")
        print(f"{name}=={bound}.*" + (f" ;{marker}" if marker else ""))
EOF
}

if ! cmp -s pyproject.toml "$venv/.installed"; then
    [[ -x $venv/bin/python ]] || "$(pipeline_python)" -m venv "$venv"
    oldest >"$venv/oldest.txt"
    echo "installing the oldest versions (PyTorch is 5 GB on disk)" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[test]" -r "$venv/oldest.txt"
    cp pyproject.toml "$venv/.installed"
fi
export PATH=$venv/bin:$PATH OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
exec python -m pytest -m "not medium and not slow and not slurm and not browser and not long" "$@"
