#!/usr/bin/env bash
# Train the four lecture recipes at full size on one GPU, each for as long as its piece of time allows, and keep their
# ledgers. A piece that ends early is resumed by the next call: the same command again goes on.
#
#   benchmarks/lessons_on_a_card.sh DATA [OUT] [MINUTES]
#
# DATA: CIFAR-10 as class folders (`pipeline fetch cifar10 DATA` makes them). OUT [runs/lessons]: the run folders, and
# OUT/ledgers with the ledger of each recipe that is finished. MINUTES [10]: for this call, all recipes together.
set -eu

RECIPES=(resnet18 vgg16 densenet121 inception_v3)

train() { # RECIPE SECONDS: SIGTERM saves and stops; exit code 75 says so
    local run=$out/$1 code=0
    timeout --signal=TERM --kill-after=120 "$2" python -m pipeline train --config "cifar10-$1-lecture" \
        --data.root "$data" --run_dir "$run" --tracking.wandb disabled "${options[@]}" || code=$?
    case $code in
    0) cp "$run/metrics.jsonl" "$out/ledgers/cifar10-$1-lecture.jsonl" ;;
    75 | 124) echo "$1: the time is over; the same command resumes it" ;;
    *) return "$code" ;;
    esac
}

main() {
    local recipe left end
    if (($# < 1)); then
        sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
        exit 2
    fi
    data=$1 out=${2:-runs/lessons}
    # shellcheck disable=SC2206 # several options in one variable
    options=(${TRAIN_OPTIONS:-})
    mkdir -p "$out/ledgers"
    end=$((SECONDS + 60 * ${3:-10}))
    for recipe in "${RECIPES[@]}"; do
        left=$((end - SECONDS))
        [[ ! -e $out/ledgers/cifar10-$recipe-lecture.jsonl ]] || continue # finished by a call before
        ((left > 15)) || {
            echo "no time left for $recipe: the same command goes on" >&2
            exit 75
        }
        train "$recipe" $((left - 10))
    done
    [[ $(find "$out/ledgers" -name '*.jsonl' | wc -l) == "${#RECIPES[@]}" ]] || exit 75
}

main "$@"
