#!/bin/bash
# Pack DATA_ROOT into tar shards at SHARDS; no GPU is asked for. A shard that is whole is never written again, so a
# job that was preempted or killed resumes where it was. Submit from the project's folder:
#
#   sbatch slurm/pack.sh                                       one node
#   DATA_ROOT=/scratch/imagenet SHARDS=/scratch/imagenet-320 sbatch slurm/pack.sh --short-side 320
#   SHARDS=/scratch/imagenet-restart sbatch slurm/pack.sh --restart
#
# On many nodes: each task of an array writes its share of the shards; a job after them makes the index.
#
#   job=$(sbatch --parsable --array=1-16 slurm/pack.sh)        the tree must be indexed: slurm/fetch.sh does that
#   sbatch --dependency=afterok:"$job" slurm/pack.sh           with the same options
#
# What stands after the script's name goes to `pipeline pack`. From the environment, or from slurm/site.env (see
# site.env.example): DATA_ROOT [data/imagenet], SHARDS [DATA_ROOT-shards], PIPELINE_HOME [where sbatch was called],
# PYTHON [python].

#SBATCH --job-name=pack
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

load() { # what the scripts share
    : "${PIPELINE_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}"
    if [[ ! -r $PIPELINE_HOME/slurm/job.sh ]]; then
        echo "no slurm/job.sh in PIPELINE_HOME=$PIPELINE_HOME: submit from the project's folder, or give PIPELINE_HOME" >&2
        exit 2
    fi
    # shellcheck source=slurm/job.sh
    . "$PIPELINE_HOME/slurm/job.sh"
}

progress() { # the shards that are there
    ls "$SHARDS" 2>/dev/null
}

main() { # OPTION ...: of `pipeline pack`
    local part=()
    # shellcheck disable=SC2034 # of lib/site.sh: no node may be lost
    fixed_nodes=yes
    load
    : "${SHARDS:=${DATA_ROOT%/}-shards}"
    # shellcheck disable=SC2034 # of lib/run_folder.sh. Beside SHARDS: `pipeline pack` takes an empty folder or its own.
    PROGRESS_DIR=$(dirname "$SHARDS")
    count_requeues
    if [[ -n $ARRAY_TASK ]]; then
        part=(--part "$((ARRAY_TASK - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT")
    fi
    run_step 1 "$PYTHON" -m pipeline pack "$DATA_ROOT" "$SHARDS" "${part[@]}" "$@"
    leave $?
}

main "$@"
