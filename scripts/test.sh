#!/usr/bin/env bash
# Format, lint and tests. Makes .venv if need be. Arguments go to pytest: scripts/test.sh -k checkpoint
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
pipeline_env test
if [ -x scripts/install_test_tools.sh ]; then
    scripts/install_test_tools.sh
fi
ruff format --check .
ruff check .
exec python -m pytest "$@"
