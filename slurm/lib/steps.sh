# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables
# What runs on the nodes: one `srun` each, one task a node.

STEP_OPTIONS=() # of the next step

run_step() { # COUNT COMMAND ...: on so many nodes, once on each, at the same time
    local nodes=$1 code options=("${STEP_OPTIONS[@]}")
    shift
    STEP_OPTIONS=()
    [[ -z $stop_reason ]] || return 1
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --wait=0 --overlap --export=ALL \
        "${options[@]}" "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" "$@" &
    step_pid=$!
    await "$step_pid"
    code=$?
    step_pid=''
    return "$code"
}

on_every_node() { # VERB ...: `pipeline VERB ...`
    log "$1 on $SLURM_JOB_NODELIST"
    run_step "$SLURM_NNODES" "$PYTHON" -m pipeline "$@"
}

preflight() { # OPTION ...: every node reports its facts, then one of them judges
    local nodes=$RUN_DIR/.nodes.$JOB code smaller=() sizes
    if ((nodes_required < nodes_at_most)); then
        sizes=$(seq -s , $((nodes_required * NPROC_PER_NODE)) "$NPROC_PER_NODE" $((nodes_at_most * NPROC_PER_NODE)))
        smaller=(--world_sizes "$sizes")
    fi
    find_head
    echo "$ATTEMPT" >"$RUN_DIR/.token"
    on_every_node preflight "$@" --node_facts --run_token "$ATTEMPT" --rendezvous "$HEAD:$PORT" >"$nodes" || return
    if (($(grep -c '^{"node"' "$nodes") < SLURM_NNODES)); then
        log "not every node could start a step: see above"
        return 1
    fi
    run_step 1 "$PYTHON" -m pipeline preflight "$@" --nodes_file "$nodes" --time_limit "$TIME_LIMIT" \
        --signal_lead "$LEAD_S" --world_size $((nodes_at_most * NPROC_PER_NODE)) "${smaller[@]}"
    code=$?
    rm -f "$nodes" "$RUN_DIR/.token"
    return "$code"
}

address_of() { # NODE: as Slurm reaches it
    local address
    address=$(ask_slurm scontrol show node --oneliner "$1" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
    echo "${address:-$1}"
}

find_head() { # HEAD and PORT, where the nodes meet: by the address that Slurm has for the first node, since names of
    # nodes need not resolve. HEAD_ADDRESS in the environment or site.env takes precedence.
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    HEAD=${HEAD_ADDRESS:-$(address_of "${nodes[0]}")}
    PEER_ADDRESS=$(address_of "${nodes[-1]}")
    export PEER_ADDRESS
    PORT=$((10000 + SLURM_JOB_ID % 20000))
    while (: >"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do PORT=$((PORT + 1)); done # in use
}

ranks_on_every_node() { # VERB ...: `pipeline VERB ...` as one process for each GPU
    find_head
    # The launchers end together, so srun need not end those of other nodes.
    [[ $HEAD != *:* ]] || HEAD=[$HEAD] # IPv6
    export RENDEZVOUS=$HEAD:$PORT RENDEZVOUS_ID=$ATTEMPT SLURM_KILL_BAD_EXIT=0 JOB GRACE_S
    ((nodes_required == SLURM_NNODES)) || STEP_OPTIONS=(--no-kill)
    log "$* on $SLURM_JOB_NODELIST"
    run_step "$SLURM_NNODES" bash "$PIPELINE_HOME/slurm/node.sh" "$@"
}

train_on_every_node() { # OPTION ...: from here on a signal means: save, then stop
    export STOP_FILE=$RUN_DIR/stop
    if [[ $STOP_FILE -nt $PROGRESS_DIR/.requeues.$JOB ]]; then # made while the nodes were checked or the data copied
        log "stopped by $STOP_FILE before the training, so it is not requeued: submit the same again to resume"
        leave_with 75
    fi
    rm -f "$RUN_DIR"/{stop,interrupted,failed,finished} # of an earlier start
    phase=training
    remember_steps_soon &
    ranks_on_every_node train "$@"
}
