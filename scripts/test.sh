#!/usr/bin/env bash
# Format, lint and tests. Makes .venv if need be. Arguments go to pytest: scripts/test.sh -k checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
pipeline_env test
if [ -x scripts/install_test_tools.sh ]; then
    scripts/install_test_tools.sh
fi
free=$(df -Pk "${TMPDIR:-/tmp}" | awk 'NR == 2 { print int($4 / 1024) }')
if ((free < 3000)); then
    echo "${TMPDIR:-/tmp} has $free MB free; the tests need 3000: make room, or set TMPDIR" >&2
    exit 1
fi
# Threads that wait for each other sleep: beside other work on the machine, spinning makes a small network 50 times slower.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
ruff format --check .
ruff check .
exec python -m pytest "$@"
