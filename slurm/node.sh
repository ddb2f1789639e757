#!/usr/bin/env bash
# Runs once on every node of a job, started by srun: `pipeline launch` with one rank for each GPU. A signal to the job's
# steps reaches this shell, which turns it into the file RUN_DIR/stop; the launcher of a training ignores it, the one of
# an evaluation is sent TERM. With MIN_NODES or SPARE_NODES the job survives the loss of nodes: the first node hosts the
# rendezvous in a process of its own. Where Slurm says that the first node itself is lost, the others have the job
# requeued; one that only lost its way there joins again when it has found it.
# Bash reads a script while it runs it: all of this is functions and one last line, so that it may be edited.
set -u +e +o posix # whatever BASH_ENV, SHELLOPTS and POSIXLY_CORRECT say

STORE_LOST=68 INTERRUPTED=75 # exit codes of `pipeline launch`: the rendezvous is out of reach; asked to stop
REJOINS=${REJOINS:-20}        # of a node whose network comes and goes

# shellcheck disable=SC2317,SC2329 # the traps call it
on_signal() { # $1: its name
    if [[ -n ${STOP_FILE:-} ]]; then
        request_stop "$RENDEZVOUS_ID $1 to the step on $node" || keep_requesting "$RENDEZVOUS_ID $1 to the step on $node" &
    elif [[ -n $launcher ]]; then
        terminated=yes
        kill -TERM "$launcher" # its ranks keep what they have
    else # nothing has begun
        [[ -z $scratch ]] || rm -rf "$scratch"
        exit "$INTERRUPTED"
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
    cpus=$("$PYTHON" -c 'from pipeline.limits import available_cores as n; print(n())') || cpus='' # bound cores, CPU quota
    [[ $cpus =~ ^[0-9]+$ ]] || cpus=$(nproc)
    # shellcheck disable=SC2153
    ((cpus <= SLURM_CPUS_ON_NODE)) || cpus=$SLURM_CPUS_ON_NODE
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > NPROC_PER_NODE ? cpus / NPROC_PER_NODE : 1))}
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # no stack trace when the ranks part
    scratch=$(mktemp -d) && export TMPDIR=$scratch # the launcher leaves files behind
    options=()
    if [[ -d /sys/devices/system/node/node1 && -d /proc/driver/nvidia/gpus && -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        options+=(--numa-binding=node)
    fi
    max_nodes=$((SLURM_NNODES - ${SPARE_NODES:-0}))
    min_nodes=${MIN_NODES:-$max_nodes}
    hosts=0
    if ((SLURM_NNODES == 1)); then
        RENDEZVOUS=127.0.0.1:${RENDEZVOUS##*:}
    else
        find_network
    fi
    [[ ${SLURM_NODEID:-0} != 0 ]] || hosts=1
    elastic='' # may nodes be lost?
    if ((min_nodes < SLURM_NNODES)); then elastic=yes; fi
    meeting=(--nnodes="$min_nodes:$max_nodes" --rdzv-backend=c10d --rdzv-endpoint="$RENDEZVOUS" --rdzv-id="$RENDEZVOUS_ID"
        --max-restarts="${MAX_RESTARTS:-3}" --rejoin-timeout="${REJOIN_S:-30}")
}

find_network() { # the network interface on the way to the other nodes, since this node's own name may not resolve
    local peer route
    peer=$(rendezvous_host)
    if [[ ${SLURM_NODEID:-0} == 0 ]]; then # the way to itself is the loopback interface
        peer=${PEER_ADDRESS:-}
    fi
    route=$(ip -o route get "$(getent ahosts "$peer" | awk '{ print $1; exit }')" 2>/dev/null) || return
    if [[ $route =~ \ dev\ ([^ ]+) ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-${BASH_REMATCH[1]}}
    fi
}

rendezvous_host() { # an IPv6 address without its brackets
    local host=${RENDEZVOUS%:*}
    host=${host#[}
    echo "${host%]}"
}

serve_rendezvous() { # VERB ...: the ranks must divide its global batch
    trap '' TERM USR1 USR2 INT HUP
    exec "$PYTHON" -m pipeline launch --serve-store "${meeting[@]}" --rdzv-conf=is_host=1 -m pipeline "$@"
}

launch_ranks() { # VERB ...
    if [[ -n ${STOP_FILE:-} ]]; then trap '' TERM USR1 USR2 INT HUP; else trap - TERM USR1 USR2 INT HUP; fi
    exec "$PYTHON" -m pipeline launch "${meeting[@]}" --rdzv-conf="is_host=$hosts" --nproc-per-node="$NPROC_PER_NODE" \
        --shutdown-timeout="${GRACE_S:-120}" "${options[@]}" -m pipeline "$@" # there may be a file named train
}

await() { # $1: pid; returns its exit code. A signal ends `wait`, not what it waits for.
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

rendezvous_answers() { # a dropped packet is waited for without an end
    timeout 5 bash -c ": >/dev/tcp/$(rendezvous_host)/${RENDEZVOUS##*:}" 2>/dev/null
}

find_first_node() { # 0: this node joins again, which it does REJOINS times at most. The batch shell was lost with the first node, or does the same as here:
    # requeue the job. Where only the way to it is broken, the job may be healthy: Slurm knows.
    local answer end=$((SECONDS + ${REQUEUE_S:-600})) first lost='' said='' state
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    while ((SECONDS < end)); do
        [[ ! -e $RUN_DIR/.code.$RENDEZVOUS_ID ]] || return 1 # the first node was there to the end
        if answer=$(LC_ALL=C timeout 90 scontrol show job --oneliner "$SLURM_JOB_ID" 2>&1); then
            [[ $answer == *" JobState=RUNNING "* && $answer == *" Restarts=${RENDEZVOUS_ID##*.} "* ]] || return 1
            if answer=$(LC_ALL=C timeout 90 scontrol show node --oneliner "$first" 2>&1); then
                [[ $answer =~ \ State=([^ ]+) ]] && state=${BASH_REMATCH[1]} || state=unknown
                lost='' answer="Slurm has it as $state"
                [[ $state != *DOWN* && $state != *NOT_RESPONDING* && $state != *"*"* ]] || lost=yes
            fi
        fi
        if [[ -z $lost ]] && rendezvous_answers; then
            if ((rejoins >= REJOINS)); then
                echo "$node: the rendezvous on $first answers again; this node stays out, it has joined again $REJOINS times"
                return 1
            fi
            rejoins=$((rejoins + 1))
            echo "$node: the rendezvous on $first answers again; this node joins again"
            return 0
        elif [[ -n $lost ]] && answer=$(LC_ALL=C timeout 90 scontrol requeue "$JOB" 2>&1); then
            echo "$node: the first node was lost; the job is requeued"
            return 1
        elif [[ $answer != "$said" ]]; then
            said=$answer
            echo "$node: the rendezvous on $first is out of reach, and the job is not requeued yet: $answer"
        fi
        sleep 3
    done
    if [[ -n $lost ]]; then
        echo "$node: $first was lost, and the job can't be requeued: it is cancelled; submit the same again to resume"
        scancel "$JOB"
    else
        echo "$node: $first answers Slurm, so the job goes on without this node: is the network between them broken?"
    fi
    return 1
}

main() { # VERB ...: `pipeline VERB ...`
    local code log rejoins=0 signal store=''
    node=${SLURMD_NODENAME:-$(hostname)}
    mkdir -p "$RUN_DIR/logs"
    log=$RUN_DIR/logs/$SLURM_JOB_ID-$node.log
    exec > >(trap '' TERM USR1 USR2 INT HUP && exec tee -a "$log") 2>&1
    launcher='' scratch='' terminated=''
    for signal in TERM USR1 USR2 INT HUP; do
        # shellcheck disable=SC2064
        trap "on_signal SIG$signal" "$signal"
    done
    settings
    if [[ -n $elastic && $hosts == 1 ]]; then
        hosts=0
        serve_rendezvous "$@" &
        store=$!
    fi
    while :; do
        launch_ranks "$@" &
        launcher=$!
        await "$launcher"
        code=$?
        if [[ -z $elastic || -n $store || $code != "$STORE_LOST" ]] || ! find_first_node; then
            break
        fi
    done
    if [[ -n $terminated ]] && ((code == 128 + 15)); then
        code=$INTERRUPTED # Python was not up yet
    fi
    if [[ -n $store ]]; then
        await "$store" # the others may go on without this node's launcher
        code=$?
    fi
    if [[ ${SLURM_NODEID:-0} == 0 ]]; then
        echo "$code" >"$RUN_DIR/.code.$RENDEZVOUS_ID"
    fi
    [[ -z $scratch ]] || rm -rf "$scratch"
    exit "$code"
}

main "$@"
