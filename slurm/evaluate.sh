#!/bin/bash
# Score a run's checkpoint on the whole validation set, with every GPU asked for. Submit from the project's folder:
#
#   RUN_DIR=runs/resnet152 sbatch slurm/evaluate.sh                                  the best checkpoint
#   RUN_DIR=runs/resnet152 sbatch slurm/evaluate.sh --checkpoint last --json scores.json
#
# What stands after the script's name goes to `pipeline evaluate`. From the environment or slurm/site.env: RUN_DIR,
# DATA_ROOT (default: where the run had its data), NPROC_PER_NODE, PYTHON, PIPELINE_HOME, as in resnet152.sh.

#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-gpu=8
#SBATCH --time=1:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

: "${PIPELINE_HOME:=$SLURM_SUBMIT_DIR}"
: "${RUN_DIR:?give the run folder: RUN_DIR=runs/NAME sbatch slurm/evaluate.sh}"
data=(${DATA_ROOT:+--data_root "$DATA_ROOT"})
# shellcheck source=slurm/job.sh
. "$PIPELINE_HOME/slurm/job.sh" || exit 2

torchrun_on_every_node evaluate "$RUN_DIR" "${data[@]}" "$@"
leave $?
