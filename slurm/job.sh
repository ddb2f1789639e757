# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables
# What the batch scripts of this folder share; they source it. It runs in the batch shell, on the job's first node.
#
# A signal ahead of the time limit, or a preemption, reaches this shell alone (--signal=B:USR1). It writes the file
# RUN_DIR/stop, which the training polls; the ranks agree on a step, save and exit; then `leave` requeues the job.
# A signal to the steps takes the same way, through node.sh. The ranks themselves are never signaled from here: under
# proctrack/cgroup a signal to a step reaches the launcher alone, which takes the ranks down before they have saved.
#
# The files in lib/: controller.sh asks Slurm; site.sh reads the environment and site.env; run_folder.sh looks after the
# run folder; steps.sh starts what runs on the nodes; end.sh decides what comes after it.

set -u +e +o posix # whatever BASH_ENV, SHELLOPTS and POSIXLY_CORRECT say

LIB=$PIPELINE_HOME/slurm/lib
for lib_file in controller site run_folder steps end; do # a name that no script of this folder has for its own
    # shellcheck source=slurm/lib/controller.sh
    . "$LIB/$lib_file.sh" || exit 2
done
unset lib_file

log() { # a full disk under the job's log must not end what follows
    { printf '[%(%F %T)T job %s] %s\n' -1 "${ATTEMPT:-}" "$*" >&3 || :; } 3>&2 2>/dev/null
}

fail() { # $1: what the user must change; there is no sense in trying again
    log "$1"
    release_run_dir
    exit 2
}

# --- signals

phase=preparing stop_reason='' signal_ms=0 step_pid=''

request_stop() { # $1: why
    local first=$stop_reason
    stop_reason=$1
    if [[ -z $first ]]; then
        signal_ms=$(date +%s%3N)
    fi
    log "$1"
    if [[ $phase == preparing ]]; then
        end_background # nothing to save yet
    elif [[ $phase == evaluating ]]; then # not by a file: the run may be in training meanwhile
        kill -USR1 "$step_pid" 2>/dev/null # srun sends it to node.sh on every node
        [[ -n $first ]] || { end_within_grace & }
    else
        write_stop_file "$ATTEMPT $1"
        [[ -n $first ]] || { stop_within_grace "$ATTEMPT $1" & }
    fi
}

stop_within_grace() { # $1: text of the stop file. Repeats the request until it is written; ends the ranks in the end
    local end=$((SECONDS + GRACE_S))
    trap - USR1 USR2 TERM INT HUP
    while ((SECONDS < end)); do
        has_stop_file || write_stop_file "$1"
        sleep 1
    done
    log "not saved within $GRACE_S s"
    kill_steps
}

end_within_grace() {
    trap - USR1 USR2 TERM INT HUP
    sleep "$GRACE_S"
    log "not ended within $GRACE_S s"
    kill_steps
}

install_traps() {
    trap 'request_stop "USR1 from Slurm: a preemption, or the time limit is near"' USR1
    trap 'request_stop "TERM from Slurm: cancelled, or the time limit is reached"' TERM
    trap 'request_stop "USR2 to the batch script"' USR2
    trap 'request_stop "INT to the batch script"' INT
    trap 'request_stop "HUP to the batch script"' HUP
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

# --- start

describe_job
install_traps
read_site_file
settings
