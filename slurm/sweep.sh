#!/bin/bash
# Train once for each combination of some options, as a job array: a task and a run folder each, every one of them
# preempted, requeued and resumed on its own. Submit from the project's folder:
#
#   sbatch --array=0-2 slurm/sweep.sh train.seed=0,1,2
#   RUN_DIR=runs/lr sbatch --array=0-5%2 slurm/sweep.sh optim.lr=0.1,0.2,0.4 train.seed=0,1 --schedule.epochs 30
#
# NAME=VALUE,VALUE,... are the options to combine; what begins with -- goes to every run, as do the environment's
# settings (see resnet152.sh). RUN_DIR holds the run folders, e.g. runs/sweep/optim.lr=0.1,train.seed=0.

#SBATCH --job-name=sweep
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-gpu=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

main() { # NAME=VALUE,VALUE,... [OPTION ...]
    local options=() name='' index=${SLURM_ARRAY_TASK_ID:?submit it with sbatch} values value combinations=1
    : "${PIPELINE_HOME:=${SLURM_SUBMIT_DIR:-$PWD}}" "${RUN_DIR:=runs/$SLURM_JOB_NAME}"
    while [[ ${1:-} == *=* && ${1:-} != --* ]]; do
        IFS=, read -ra values < <(printf '%s\n' "${1#*=}") # <<< needs room in /tmp
        value=${values[index % ${#values[@]}]}
        index=$((index / ${#values[@]})) combinations=$((combinations * ${#values[@]}))
        options+=("--${1%%=*}" "$value")
        name+=${name:+,}${1%%=*}=$value
        shift
    done
    if [[ -z $name ]] || ((index)); then
        echo "task $SLURM_ARRAY_TASK_ID has no combination: give NAME=VALUE,VALUE,... and an --array from 0 to their number \
less 1" >&2
        exit 2
    elif [[ ! -r $PIPELINE_HOME/slurm/resnet152.sh ]]; then
        echo "no slurm/resnet152.sh in PIPELINE_HOME=$PIPELINE_HOME: submit from the project's folder, or give PIPELINE_HOME" >&2
        exit 2
    fi
    if [[ " $* " == *" --run_dir"[\ =]* ]]; then
        echo "all tasks would train in one run folder: give RUN_DIR=FOLDER before sbatch instead of --run_dir" >&2
        exit 2
    fi
    if ((${SLURM_ARRAY_TASK_COUNT:-combinations} < combinations)); then
        echo "the array has $SLURM_ARRAY_TASK_COUNT of the $combinations combinations: --array=0-$((combinations - 1)) trains all" >&2
    fi
    export PIPELINE_HOME RUN_DIR=$RUN_DIR/$name
    exec bash "$PIPELINE_HOME/slurm/resnet152.sh" "${options[@]}" "$@"
}

main "$@"
