#!/usr/bin/env bash
# Runs once on every node of a job, started by srun: torchrun with a process a GPU. A signal to the job's steps reaches
# this shell, which turns it into the file RUN_DIR/stop; torchrun ignores it, since it would take the workers down.
set -u

mkdir -p "$RUN_DIR/logs"
log=$RUN_DIR/logs/$SLURM_JOB_ID-$SLURMD_NODENAME.log
exec > >(trap '' TERM USR1 INT HUP && exec tee -a "$log") 2>&1

# shellcheck disable=SC2317 # the traps call it
on_signal() { # $1: its name
    if [[ -n ${STOP_FILE:-} ]]; then
        local new=$RUN_DIR/.stop.$SLURMD_NODENAME
        echo "$RENDEZVOUS_ID $1 to the step on $SLURMD_NODENAME" >"$new" && mv "$new" "$STOP_FILE"
    else
        kill -KILL $! # nothing to save
    fi
}
trap 'on_signal SIGTERM' TERM
trap 'on_signal SIGUSR1' USR1

cpus=$(env -u OMP_NUM_THREADS nproc) # what this shell is bound to, if the site binds
# shellcheck disable=SC2153
((cpus <= SLURM_CPUS_ON_NODE)) || cpus=$SLURM_CPUS_ON_NODE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))}
# Nodes count their restarts apart; with a store shared over restarts they would meet in different ones (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # no stack trace when the ranks part
TMPDIR=$(mktemp -d) && export TMPDIR # torchrun leaves files behind
near_gpu=()
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]] && nvidia-smi --list-gpus >/dev/null 2>&1; then
    near_gpu=(--numa-binding=node)
fi

(
    trap '' TERM USR1
    exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$NPROC_PER_NODE" \
        --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="$RENDEZVOUS_ID" \
        --max-restarts="${MAX_RESTARTS:-3}" --signals-to-handle=SIGINT,SIGHUP,SIGQUIT "${near_gpu[@]}" \
        -m pipeline "$@"
) &
while kill -0 $! 2>/dev/null; do wait $!; done # a signal ends `wait`, not torchrun
wait $!
code=$?
rm -rf "$TMPDIR"
exit "$code"
