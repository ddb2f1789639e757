#!/bin/bash
# Train ResNet-152 on every GPU of the nodes asked for. On a preemption, the time limit or a node's failure the job
# saves, goes back to the queue, and resumes at its step. Submit from the project's folder:
#
#   sbatch slurm/resnet152.sh                                1 node x 8 GPUs
#   sbatch --nodes=4 slurm/resnet152.sh                      4 nodes x 8 GPUs
#   sbatch --gpus-per-node=1 --time=4:00:00 slurm/resnet152.sh
#   RUN_DIR=runs/lr-0.2 sbatch slurm/resnet152.sh --optim.lr 0.2
#   MIN_NODES=2 SPARE_NODES=1 sbatch --nodes=5 --no-kill slurm/resnet152.sh       4 train, 1 waits; 2 are enough
#   NPROC_PER_NODE=4 sbatch --gpus-per-node=0 --mincpus=16 slurm/resnet152.sh --train.device cpu     a rehearsal
#
# What stands after the script's name goes to `pipeline train`; --config, --data.root and --run_dir there take the place of
# CONFIG, DATA_ROOT and RUN_DIR. From the environment, or from slurm/site.env (see site.env.example, also for modules,
# containers and accounts):
#
#   CONFIG          recipe, a name or a file [resnet152]
#   DATA_ROOT       data set, seen from every node [data.root of a recipe file, else data/imagenet]
#   RUN_DIR         run folder, seen from every node [runs/JOB_NAME]; the same folder again continues the run
#   STAGE_DIR       folder on every node's own disk that the shards are copied to first [none: read DATA_ROOT]
#   NPROC_PER_NODE  processes a node [its GPUs]
#   GRACE_S         seconds from a signal until the job goes without a new checkpoint [120]
#   MAX_RESTARTS    times that crashed workers are started again in place [3]
#   MIN_NODES       nodes that training goes on with when others are lost; submit with --no-kill [all]
#   SPARE_NODES     nodes that wait, and take the place of lost ones [0]
#   REJOIN_S        seconds to wait for lost nodes where fewer than MIN_NODES are left, before the job is requeued [30]
#   REJOINS         times at most that a node which was out of reach joins again [20]
#   BENCH           JSON file with a measured speed, for preflight's time estimate until the run has its own [none]
#   HEAD_ADDRESS    address of the first node, where the nodes meet [as Slurm has it]
#   SITE_ENV        file with the site's settings, /dev/null for none [slurm/site.env]
#   PIPELINE_HOME   the project's folder [where sbatch was called]
#   PYTHON          interpreter [python]
#
# Logs: everything in JOB_NAME-JOB_ID.log, each node's part in RUN_DIR/logs. How it stands: pipeline status RUN_DIR

#SBATCH --job-name=resnet152
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
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

take_places() { # OPTION ...: the places among them, which go before the environment's; sets `configs`, `options`: the others
    while (($#)); do
        case $1 in
            --config=* | --data.root=* | --run_dir=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        esac
        case $1 in
            --config) configs+=(--config "${2:-}") ;; # several are one on another
            --data.root) DATA_ROOT=${2:-} ;;
            --run_dir) RUN_DIR=${2:-} ;;
            *) options+=("$1") && shift && continue ;;
        esac
        [[ -n ${2:-} ]] || { echo "$1: give a value" >&2 && exit 2; }
        shift 2
    done
}

main() { # OPTION ...: of `pipeline train`
    local train bench configs=() options=()
    take_places "$@"
    load
    ((${#configs[@]})) || configs=(--config "${CONFIG:-resnet152}")
    train=("${configs[@]}" --run_dir "$RUN_DIR" "${options[@]}")
    if [[ -z $default_data ]]; then
        train+=(--data.root "$DATA_ROOT")
    elif [[ -f ${configs[-1]} && -n ${STAGE_DIR:-} ]]; then
        fail "STAGE_DIR without DATA_ROOT: give DATA_ROOT, since ${configs[-1]} may name another data set than $DATA_ROOT"
    else
        train=(--data.root "$DATA_ROOT" "${train[@]}") # a recipe file, which comes later, goes before it
    fi
    bench=(${BENCH:+--bench "$BENCH"})
    claim_run_dir
    count_requeues
    preflight "${train[@]}" "${bench[@]}" || leave $?
    say_if_code_changed
    if [[ -n ${STAGE_DIR:-} ]]; then
        on_every_node stage "$DATA_ROOT" "$STAGE_DIR" || leave $?
        train+=(--data.root "$STAGE_DIR")
    fi
    train_on_every_node "${train[@]}"
    leave $?
}

main "$@"
