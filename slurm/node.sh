#!/usr/bin/env bash
# Runs once on every node of a job, started by srun: the launcher with one process for each GPU. A signal to the job's
# steps reaches this shell, which turns it into the file RUN_DIR/stop; the launcher ignores it, since it would take the
# ranks down. Bash reads a script while it runs it: all of this is functions and one last line, so that it may be edited.
set -u

# shellcheck disable=SC2317,SC2329 # the traps call it
on_signal() { # $1: its name
    if [[ -n ${STOP_FILE:-} ]]; then
        request_stop "$RENDEZVOUS_ID $1 to the step on $node" || keep_requesting "$RENDEZVOUS_ID $1 to the step on $node" &
    elif [[ -n $launcher ]]; then
        kill -KILL "$launcher" # nothing to save
    else
        exit 1
    fi
}

# shellcheck disable=SC2317,SC2329
request_stop() { # $1: text of the stop file. A full disk has room for a link and for an empty file.
    local new=$RUN_DIR/.stop.$node
    { { echo "$1" >"$new" && mv -f "$new" "$STOP_FILE"; } || ln -s "$1" "$STOP_FILE" || : >>"$STOP_FILE"; } 2>/dev/null
}

# shellcheck disable=SC2317,SC2329
keep_requesting() {
    until request_stop "$1"; do sleep 1; done # it ends with the step
}

settings() {
    local cpus
    cpus=$(env -u OMP_NUM_THREADS nproc) # what this shell is bound to, if the site binds
    # shellcheck disable=SC2153
    ((cpus <= SLURM_CPUS_ON_NODE)) || cpus=$SLURM_CPUS_ON_NODE
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))}
    # Nodes count their restarts apart; with a store shared over restarts they would meet in different ones
    # (pytorch#135712).
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # no stack trace when the ranks part
    TMPDIR=$(mktemp -d) && export TMPDIR # the launcher leaves files behind
    options=()
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]] && nvidia-smi --list-gpus >/dev/null 2>&1; then
        if [[ ! -d /sys/devices/system/node/node1 ]]; then
            : # one NUMA node: all cores are as near
        elif command -v numactl >/dev/null; then
            options+=(--numa-binding=node)
        else
            echo "$node has no numactl: ranks are not bound to the cores beside their GPU; have it installed" >&2
        fi
    fi
    find_network
}

find_network() { # this node's address and network interface on the way to the other nodes, since its name may not resolve
    local head=${RENDEZVOUS%:*} peer route
    [[ ${SLURM_NODEID:-0} == 0 ]] && options+=(--rdzv-conf=is_host=1) || options+=(--rdzv-conf=is_host=0)
    peer=$head
    if ((SLURM_NNODES == 1)); then
        options+=(--local-addr=localhost)
        return
    elif [[ ${SLURM_NODEID:-0} == 0 ]]; then # the way to itself is the loopback interface
        options+=(--local-addr="$head")
        peer=${PEER_ADDRESS:-}
    fi
    route=$(ip -o route get "$(getent ahosts "$peer" | awk '{ print $1; exit }')" 2>/dev/null) || return
    if [[ $route =~ \ dev\ ([^ ]+) ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-${BASH_REMATCH[1]}}
    fi
    if [[ ${SLURM_NODEID:-0} != 0 && $route =~ \ src\ ([^ ]+) ]]; then
        options+=(--local-addr="${BASH_REMATCH[1]}")
    fi
}

launch_ranks() { # VERB ...
    trap '' TERM USR1 USR2 INT HUP
    exec "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --nproc-per-node="$NPROC_PER_NODE" \
        --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="$RENDEZVOUS_ID" \
        --max-restarts="${MAX_RESTARTS:-3}" --signals-to-handle=SIGQUIT "${options[@]}" -m pipeline "$@"
}

main() { # VERB ...: `pipeline VERB ...`
    local code log signal
    node=${SLURMD_NODENAME:-$(hostname)}
    mkdir -p "$RUN_DIR/logs"
    log=$RUN_DIR/logs/$SLURM_JOB_ID-$node.log
    exec > >(trap '' TERM USR1 USR2 INT HUP && exec tee -a "$log") 2>&1
    launcher=''
    for signal in TERM USR1 USR2 INT HUP; do
        # shellcheck disable=SC2064
        trap "on_signal SIG$signal" "$signal"
    done
    settings
    launch_ranks "$@" &
    launcher=$!
    while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done # a signal ends `wait`, not the launcher
    wait "$launcher"
    code=$?
    rm -rf "$TMPDIR"
    exit "$code"
}

main "$@"
