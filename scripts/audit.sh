#!/usr/bin/env bash
# Known holes of the dependencies in constraints.txt, by OSV's list (https://osv.dev). Needs the network.
# Exit code 0: none known; 1: some, listed with the versions that fix them (or pip-audit failed); 2: no network.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
list=https://api.osv.dev/v1/vulns/GHSA-x84v-xcm2-53pg
if ! "$python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)' "$list" 2>/dev/null; then
    echo "audit: $list can't be reached; run this where there is a network" >&2
    exit 2
fi
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
"$python" -m venv "$home"
"$home/bin/pip" install --quiet --disable-pip-version-check pip-audit
"$home/bin/pip-audit" --strict --vulnerability-service osv --disable-pip --no-deps -r constraints.txt
