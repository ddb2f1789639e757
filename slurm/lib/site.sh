# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables
# The environment's settings, and the site's (slurm/site.env).

read_site_file() { # source it under the shell's default options; a failure in it names file and line
    local here=$PWD options problem given=${SITE_ENV:-}
    SITE_ENV=$(realpath -m "${given:-$PIPELINE_HOME/slurm/site.env}")
    [[ $SITE_ENV != /dev/null ]] || return 0 # none
    [[ -e $SITE_ENV || -n $given ]] || return 0
    [[ -e $SITE_ENV ]] || fail "SITE_ENV is $given, which is not there; give a file, or /dev/null for none"
    [[ -f $SITE_ENV && -r $SITE_ENV ]] || fail "$SITE_ENV can't be read"
    ! grep -q $'\r' "$SITE_ENV" || fail "$SITE_ENV has Windows line endings: sed -i 's/\\r\$//' $SITE_ENV"
    problem=$(bash -n "$SITE_ENV" 2>&1) || fail "$SITE_ENV is no bash: ${problem%%$'\n'*}"
    # The file's own values of these hold only where the environment has none.
    [[ -z ${RUN_DIR:-} ]] || RUN_DIR=$(realpath -m "$RUN_DIR")
    [[ -z ${DATA_ROOT:-} ]] || DATA_ROOT=$(realpath -m "$DATA_ROOT")
    [[ ! -f ${CONFIG:-} ]] || CONFIG=$(realpath "$CONFIG")
    options=$(set +o)
    set +u
    site_line='' site_command=''
    trap 'site_line=$LINENO site_command=$BASH_COMMAND' ERR
    trap 'site_file_ended $?' EXIT
    # shellcheck source=slurm/site.env.example
    . "$SITE_ENV"
    trap - ERR EXIT
    eval "$options"
    cd "$here" || fail "$here is gone"
    install_traps
}

site_file_ended() { # $1: exit code. site.env has ended this shell.
    set +eu
    trap - EXIT
    cd /
    log "$SITE_ENV ended the job${site_line:+, line $site_line: $site_command} (exit code $1); fix it and submit again"
    exit 2
}

settings() {
    local log name=$SLURM_JOB_NAME${ARRAY_TASK:+-$ARRAY_TASK}
    [[ -n ${DATA_ROOT:-} ]] && default_data='' || default_data=yes # the recipe's file may have another
    : "${DATA_ROOT:=data/imagenet}" "${PYTHON:=python}" "${GRACE_S:=120}" "${HOME:=$(getent passwd "$(id -u)" | cut -d: -f6)}"
    RUN_DIR=$(realpath -m "${RUN_DIR:-runs/$name}")
    PROGRESS_DIR=$RUN_DIR
    NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export RUN_DIR PYTHON NPROC_PER_NODE PATH HOME PYTHONPATH=$PIPELINE_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    LEAD_S=${SBATCH_SIGNAL:-$(grep -m 1 -o '^#SBATCH --signal=.*' "$0")}
    read_nodes
    [[ $LEAD_S =~ @([0-9]+) ]] && LEAD_S=${BASH_REMATCH[1]} || LEAD_S=0
    job_logs=() job_log_starts=() # two with sbatch's --error
    for log in "$(readlink "/proc/$$/fd/1")" "$(readlink "/proc/$$/fd/2")"; do
        [[ $log != "${job_logs[*]}" ]] || continue
        job_logs+=("$log")
        job_log_starts+=("$(stat --format=%s "$log" 2>/dev/null || echo 0)")
    done
}

read_nodes() { # sets how many nodes train at most, and how many the job can do with
    local number='^[1-9][0-9]*$' spare
    [[ -z ${fixed_nodes:-} ]] || unset MIN_NODES SPARE_NODES # site.env has them for the trainings
    spare=${SPARE_NODES:-0}
    nodes_at_most=$SLURM_NNODES nodes_required=$SLURM_NNODES
    [[ $spare == 0 || ($spare =~ $number && $spare -lt $SLURM_NNODES) ]] ||
        fail "SPARE_NODES=$spare: give a number below the job's $SLURM_NNODES nodes"
    nodes_at_most=$((SLURM_NNODES - spare))
    nodes_required=${MIN_NODES:-$nodes_at_most}
    [[ $nodes_required =~ $number && $nodes_required -le $nodes_at_most ]] ||
        fail "MIN_NODES=$nodes_required: give a number from 1 to $nodes_at_most, the job's nodes less SPARE_NODES"
    export MIN_NODES=$nodes_required SPARE_NODES=$spare
}

# NCCL chooses its network well; where it does not, set in site.env:
#   export NCCL_SOCKET_IFNAME=ib0        the interface of the first contact (not docker0, not a management network)
#   export GLOO_SOCKET_IFNAME=ib0        the same for gloo, which carries what is no gradient
#   export NCCL_IB_HCA=mlx5_0,mlx5_1     the InfiniBand adapters to use
#   export NCCL_IB_DISABLE=1             Ethernet only
#   export NCCL_DEBUG=INFO               say what was chosen
