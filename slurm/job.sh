# shellcheck shell=bash
# What the batch scripts of this folder share; they source it. It runs in the batch shell, on the job's first node.
#
# A signal ahead of the time limit, or a preemption, reaches this shell alone (--signal=B:USR1). It leaves the file
# RUN_DIR/stop, which the training polls; the ranks agree on a step, save and exit; then `leave` requeues the job.
# A TERM to the steps takes the same way, through node.sh. The workers themselves are never signalled from here: under
# proctrack/cgroup a signal to a step reaches torchrun alone, and takes the workers down before they have saved.

set -u

SITE_ENV=${SITE_ENV:-$PIPELINE_HOME/slurm/site.env}
if [[ -e $SITE_ENV ]]; then
    # shellcheck source=slurm/site.env.example
    . "$SITE_ENV"
fi
: "${DATA_ROOT:=data/imagenet}" "${PYTHON:=python}" "${GRACE_S:=120}"
RUN_DIR=$(realpath -m "${RUN_DIR:-runs/$SLURM_JOB_NAME}")
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID} # of an array's task, since its plain id may be the whole array's
ATTEMPT=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
export RUN_DIR PYTHON NPROC_PER_NODE PYTHONPATH=$PIPELINE_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# NCCL chooses its network well; where it does not, set in site.env:
#   export NCCL_SOCKET_IFNAME=ib0        the interface of the first contact (not docker0, not a management network)
#   export NCCL_IB_HCA=mlx5_0,mlx5_1     the InfiniBand adapters to use
#   export NCCL_IB_DISABLE=1             Ethernet only
#   export NCCL_DEBUG=INFO               say what was chosen

log() { printf '[%(%F %T)T job %s] %s\n' -1 "$ATTEMPT" "$*" >&2; }

# --- signals

phase=preparing stop_reason='' stop_ms=0

request_stop() { # $1: why
    local first=$stop_reason
    stop_reason=$1
    log "$1"
    [[ -z $first ]] || return
    stop_ms=$(date +%s%3N)
    if [[ $phase == preparing ]]; then
        end_background # nothing to save yet
    else
        echo "$ATTEMPT $1" >"$RUN_DIR/.stop.$JOB" && mv "$RUN_DIR/.stop.$JOB" "$STOP_FILE"
        { sleep "$GRACE_S" && log "not saved within $GRACE_S s" && kill_steps; } &
    fi
}
trap 'request_stop "USR1 from Slurm: a preemption, or the time limit is near"' USR1
trap 'request_stop "TERM from Slurm: cancelled, or the time is over"' TERM

kill_steps() { # `scancel --signal=KILL JOB` would cancel the job
    local steps
    mapfile -t steps < <(squeue --steps --noheader --job "$JOB" --format=%i | grep '\.[0-9]*$')
    scancel --signal=KILL "${steps[@]}"
}

end_background() {
    local pids
    mapfile -t pids < <(jobs -p)
    ((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null
}

await() { # $1: pid; returns its exit code. A signal ends `wait`, not what it waits for.
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# --- steps

unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_GPUS_PER_NODE SLURM_TRES_PER_TASK # a step gets what the job has

run_step() { # COUNT COMMAND ...: on so many nodes, once on each, at the same time
    local nodes=$1
    shift
    [[ -z $stop_reason ]] || return 1
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --wait=0 --overlap \
        "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$@" &
    await $!
}

on_every_node() { # VERB ...: `pipeline VERB ...`
    log "$1 on $SLURM_JOB_NODELIST"
    run_step "$SLURM_NNODES" "$PYTHON" -m pipeline "$@"
}

claim_run_dir() { # one job at a time trains in a run folder; `pipeline train` locks it, this says so sooner
    local owner state=''
    mkdir -p "$RUN_DIR" || exit 2
    owner=$(grep -os '"slurm_job_id": "[0-9]*"' "$RUN_DIR/lock" | grep -o '[0-9]*')
    while [[ -n $owner && $owner != "$SLURM_JOB_ID" ]]; do
        state=$(squeue --noheader --job "$owner" --states=RUNNING,SUSPENDED,COMPLETING --format=%T 2>/dev/null)
        [[ $state == COMPLETING ]] || break
        sleep 2
    done
    if [[ -n $state ]]; then
        log "job $owner is at work in $RUN_DIR: submit with --dependency=afterany:$owner, or give another RUN_DIR"
        exit 2
    fi
}

count_requeues() { # a job that is requeued again and again without a new checkpoint is broken
    local job='' before='' count=0 now
    now=$(printf '%s\n' "$RUN_DIR"/checkpoints/step-*/meta.json | tail -n 1)
    now=${now%/meta.json} now=${now##*/}
    [[ ! -e $RUN_DIR/.requeues ]] || read -r job before count <"$RUN_DIR/.requeues"
    [[ $job == "$SLURM_JOB_ID" && $before == "$now" ]] && count=$((count + 1)) || count=0
    echo "$SLURM_JOB_ID $now $count" >"$RUN_DIR/.requeues"
    if ((count >= 3)); then
        log "requeued $count times without a new step: see above what ended it, mend that, submit the same again"
        exit 2
    fi
}

preflight() { # OPTION ...: every node says what it sees, then one of them judges
    local nodes=$RUN_DIR/.nodes.$JOB limit
    limit=$(squeue --noheader --job "$JOB" --format=%l)
    on_every_node preflight "$@" --node_facts >"$nodes" || return
    if (($(grep -c '^{"node"' "$nodes") < SLURM_NNODES)); then
        log "not every node could start a step: see above"
        return 1
    fi
    run_step 1 "$PYTHON" -m pipeline preflight "$@" --nodes_file "$nodes" --time_limit "$limit" \
        --world_size $((SLURM_NNODES * NPROC_PER_NODE))
}

torchrun_on_every_node() { # VERB ...: `pipeline VERB ...` as a process a GPU
    local head port=$((10000 + SLURM_JOB_ID % 20000))
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    while (: >"/dev/tcp/$head/$port") 2>/dev/null; do port=$((port + 1)); done # somebody else's
    export RENDEZVOUS=$head:$port RENDEZVOUS_ID=$ATTEMPT SLURM_KILL_BAD_EXIT=1 # one node gone, all gone
    log "$* on $SLURM_JOB_NODELIST"
    run_step "$SLURM_NNODES" bash "$PIPELINE_HOME/slurm/node.sh" "$@"
}

train_on_every_node() { # OPTION ...: from here on a signal means: save, then stop
    rm -f "$RUN_DIR"/{stop,interrupted,failed,finished} # of an earlier start
    export STOP_FILE=$RUN_DIR/stop
    phase=training
    torchrun_on_every_node train "$@"
}

# --- the end

leave() { # $1: exit code of the last step. Requeues the job if it deserves it. Never returns.
    local code=$1
    trap '' USR1 TERM
    end_background
    if [[ -z $stop_reason && $phase == training && -e $RUN_DIR/interrupted ]]; then # this shell was not told
        if [[ -e $STOP_FILE && $(<"$STOP_FILE") != "$ATTEMPT "* ]]; then
            log "stopped by $STOP_FILE, so it is not requeued: submit the same again to go on"
            exit 75
        fi
        stop_reason=$(grep -o '"reason": "[^"]*"' "$RUN_DIR/interrupted" | cut -d'"' -f4)
        stop_ms=$(date -r "$STOP_FILE" +%s%3N 2>/dev/null)
    fi
    if ((stop_ms)); then
        stop_ms=$(($(date +%s%3N) - stop_ms))
        log "$((stop_ms / 1000)).$((stop_ms % 1000 / 100)) s from the signal to the end of the step"
    fi
    if [[ $phase == training ]]; then
        [[ ! -e $RUN_DIR/finished ]] || exit 0
        ! grep -qs '"exit_code": 2' "$RUN_DIR/failed" || code=2 # torchrun says 1 for whatever its workers say
    fi
    if [[ $phase == preparing ]] && ((code == 0)); then
        exit 0 # a script without training has done its work
    elif ((code == 2)); then
        log "failed: the user's to mend, so it is not requeued"
    elif [[ -n $stop_reason ]]; then
        requeue
    elif ((code)); then
        log "failed with exit code $code; not requeued. Submitted again, it goes on from the last checkpoint."
    fi
    exit "$code"
}

requeue() {
    local now
    now=$(scontrol show job --oneliner "$JOB")
    if [[ $now != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        log "Slurm has requeued the job" # it is this script's successor's now
        exit 0
    elif [[ $now =~ \ (JobState=RUNNING|Reason=TimeLimit)\  ]]; then
        [[ ! $now =~ \ PreemptTime=[0-9] ]] || stop_reason="preempted by Slurm"
        log "requeued: $stop_reason"
        scontrol requeue "$JOB" && exit 0
        log "Slurm refuses to requeue it; submit the same again to go on"
    else # to requeue a job that somebody cancelled would revive it
        log "cancelled: submit the same again to go on"
    fi
    exit 75
}
