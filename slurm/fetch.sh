#!/bin/bash
# ImageNet from a Kaggle account into DATA_ROOT, verified and indexed, on a node that reaches the internet; no GPU is
# asked for. On a preemption, the time limit or a node's failure the job goes back to the queue and resumes with what
# is missing. Submit from the project's folder:
#
#   sbatch --partition=transfer slurm/fetch.sh
#   DATA_ROOT=/scratch/imagenet sbatch slurm/fetch.sh --classes 10         a trial in minutes
#
# What stands after the script's name goes to `pipeline fetch`. From the environment, or from slurm/site.env (see
# site.env.example): DATA_ROOT [data/imagenet], PIPELINE_HOME [where sbatch was called], PYTHON [python]. Kaggle's token
# is read where its own client reads it (~/.kaggle/access_token or kaggle.json); a node without internet says so after a minute.

#SBATCH --job-name=fetch
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
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

progress() { # what `pipeline fetch` has noted as written, and how much there is of a whole archive (--via zip)
    { cat "$DATA_ROOT"/.fetch/*journal* | tail -c 4096 && stat --format=%s "$DATA_ROOT"/.fetch/download/*; } 2>/dev/null
}

main() { # OPTION ...: of `pipeline fetch`
    # shellcheck disable=SC2034 # of lib/site.sh: no node may be lost
    fixed_nodes=yes
    load
    # shellcheck disable=SC2034 # of lib/run_folder.sh
    PROGRESS_DIR=$DATA_ROOT/.fetch
    count_requeues
    run_step 1 "$PYTHON" -m pipeline fetch "$DATA_ROOT" "$@"
    leave $?
}

main "$@"
