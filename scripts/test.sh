#!/usr/bin/env bash
# Format, lint, types, docs and tests. Makes .venv if needed.
# Usage: scripts/test.sh [--fast | --all] [pytest's arguments]
#   --fast      3 minutes: nothing that takes more than 0.6 s, no Slurm, no browser; installs nothing as root
#   (default)   everything but the tests marked "long"
#   --all       everything: clusters, elasticity and repeated kills as well
# For example: scripts/test.sh --fast -k checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."

marks="not long"
case "${1:-}" in
    --fast)
        marks="not medium and not slow and not slurm and not browser and not long"
        shift
        ;;
    --all)
        marks=""
        shift
        ;;
    -h | --help)
        sed -n 's/^# \{0,1\}//; 2,/^set/ { /^set/!p; }' "$0"
        exit 0
        ;;
esac

. scripts/env.sh
pipeline_env test
if [[ $marks != *"not slurm"* ]]; then
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
lint-imports
mypy
# Two processes begin with half of the tests each (-n 0: all in one process).
exec python -m pytest -m "$marks" -n 2 --dist worksteal "$@"
