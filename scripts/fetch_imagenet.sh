#!/usr/bin/env bash
# ImageNet from a Kaggle account into DEST, verified. Run the same command again to resume.
# Usage: scripts/fetch_imagenet.sh DEST [options]        (options: see --help; shards: --pack --restart)
set -euo pipefail
# shellcheck source=scripts/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
pipeline_env ""
exec python -m pipeline fetch "$@"
