# Sourced by the other scripts: makes .venv at the project's root if need be, and puts it first on PATH.
# Variables: PYTHON (python3.11 or newer; default python3), PIPELINE_VENV (default: .venv at the root).
# shellcheck shell=bash

PIPELINE_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PIPELINE_VENV=${PIPELINE_VENV:-$PIPELINE_ROOT/.venv}

# pipeline_python: the interpreter to build the environment with, or one clear line
pipeline_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no python 3.11 or newer with the venv module; on Debian and Ubuntu: apt-get install python3 python3-venv" >&2
    return 2
}

# pipeline_env [EXTRA]: install the project, with an extra such as "test", unless that was done for these very files
pipeline_env() {
    local extra=${1:+[$1]} stamp="$PIPELINE_VENV/.installed${1:+-$1}" python
    if [ ! -x "$PIPELINE_VENV/bin/python" ]; then
        python=$(pipeline_python) || return
        echo "making $PIPELINE_VENV" >&2
        "$python" -m venv "$PIPELINE_VENV" || return
    fi
    if ! cat "$PIPELINE_ROOT/pyproject.toml" "$PIPELINE_ROOT/constraints.txt" | cmp -s - "$stamp"; then
        echo "installing the project and what it needs (PyTorch is 5 GB on disk; about two minutes)" >&2
        "$PIPELINE_VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            -e "$PIPELINE_ROOT$extra" -c "$PIPELINE_ROOT/constraints.txt" || return
        # kaggle 2.2.5 asks for a certifi that is not everywhere to be had, only for its list of certificates;
        # 2.2.4, which pip then takes, can spoil a partial download.
        "$PIPELINE_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
            'kaggle>=2.2.5' 'kagglesdk>=0.1.38' || return
        cat "$PIPELINE_ROOT/pyproject.toml" "$PIPELINE_ROOT/constraints.txt" >"$stamp"
    fi
    PATH=$PIPELINE_VENV/bin:$PATH
    export PATH
}
