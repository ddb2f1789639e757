#!/usr/bin/env bash
# Train the four lectures' networks on one CPU core, one after another, in the forms that a core can do, and keep their
# ledgers. Stop it at will (Ctrl-C, SIGTERM, kill -9, power): the same command again goes on where it was.
#
#   benchmarks/lectures.sh DATA [OUT]
#
# DATA: CIFAR-10 as class folders (`pipeline fetch cifar10 DATA` makes them). OUT [runs/lectures]: the run folders, and
# OUT/ledgers with the ledger of each recipe that is finished. How long each takes: docs/recipes.md. RECIPES, a list:
# other recipes, or another order. TRAIN_OPTIONS: further options of train.
set -eu

train() { # RECIPE: SIGTERM and Ctrl-C are passed on, and the run saves before it ends
    local run=$out/$1 code=0 job
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive nice -n 19 python -m pipeline train --config "$1" --data.root "$data" \
        --run_dir "$run" --data.threads 1 --train.device cpu --tracking.wandb disabled "${options[@]}" &
    job=$!
    trap 'kill -TERM "$job" 2>/dev/null' TERM INT
    while :; do # a signal ends `wait`, not the run
        code=0
        wait "$job" || code=$?
        kill -0 "$job" 2>/dev/null || break
    done
    trap - TERM INT
    if ((code != 0)); then
        echo "$1: ended with exit code $code; the same command resumes it" >&2
        exit "$code"
    fi
    gzip -9 -n -c "$run/metrics.jsonl" >"$out/ledgers/$1.jsonl.gz.tmp"
    mv "$out/ledgers/$1.jsonl.gz.tmp" "$out/ledgers/$1.jsonl.gz"
}

main() {
    local recipe
    if (($# < 1)); then
        sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
        exit 2
    fi
    data=$1 out=${2:-runs/lectures}
    # shellcheck disable=SC2206 # several options in one variable
    options=(${TRAIN_OPTIONS:-})
    # shellcheck disable=SC2206 # several recipes in one variable
    recipes=(${RECIPES:-cifar10-resnet18-128 cifar10-densenet121-64 cifar10-vgg16-64 cifar10-inception_v3-4})
    mkdir -p "$out/ledgers"
    for recipe in "${recipes[@]}"; do
        [[ ! -e $out/ledgers/$recipe.jsonl.gz ]] || continue # finished by a call before
        train "$recipe"
    done
}

main "$@"
