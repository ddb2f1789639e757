#!/bin/bash
# Score a run's checkpoint on the whole validation set, with every GPU asked for. Submit from the project's folder:
#
#   RUN_DIR=runs/resnet152 sbatch slurm/evaluate.sh                                  the best checkpoint
#   RUN_DIR=runs/resnet152 sbatch slurm/evaluate.sh --checkpoint last --json scores.json
#
# What stands after the script's name goes to `pipeline evaluate`. From the environment or slurm/site.env: RUN_DIR,
# DATA_ROOT (default: where the run had its data), NPROC_PER_NODE, PYTHON, PIPELINE_HOME, as in resnet152.sh. An evaluation
# that is preempted or does not fit the time limit is requeued, and resumes with the batches that were not scored yet.

#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=1:00:00
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

progress() { # an evaluation's partial sums
    cat "$RUN_DIR"/evaluation/*/rank-* 2>/dev/null
}

main() { # OPTION ...: of `pipeline evaluate`
    local data=(${DATA_ROOT:+--data_root "$DATA_ROOT"})
    if [[ -z ${RUN_DIR:-} ]]; then
        echo "give the run folder: RUN_DIR=runs/NAME sbatch slurm/evaluate.sh" >&2
        exit 2
    fi
    : "${GRACE_S:=45}" # less than the signal's lead
    # shellcheck disable=SC2034 # of lib/site.sh: no node may be lost
    fixed_nodes=yes
    load
    [[ -d $RUN_DIR ]] || fail "RUN_DIR=$RUN_DIR: no such folder; give the folder of a run"
    count_requeues
    phase=evaluating
    ranks_on_every_node evaluate "$RUN_DIR" "${data[@]}" "$@"
    leave $?
}

main "$@"
