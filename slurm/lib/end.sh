# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables
# What comes after the last step: done, requeued, or one line that says what to do.

STORE_LOST=68 NODE_LOST=69 GPU_FAULT=71 INTERRUPTED=75 # exit codes of `pipeline launch`, beside 1 and 2

leave() { # $1: exit code of the last step. Requeues the job if that makes sense. Never returns.
    local code=$1
    trap '' USR1 USR2 TERM INT HUP
    end_background
    code=$(cat "$RUN_DIR/.code.$ATTEMPT" 2>/dev/null) # the launchers'; srun's is the highest of all nodes
    [[ $code =~ ^[0-9]+$ ]] || code=$1                # none, or empty: the disk was full
    rm -f "$RUN_DIR/.code.$ATTEMPT"
    find_stop_reason "$code"
    if ((${signal_ms:-0})); then
        signal_ms=$(($(date +%s%3N) - signal_ms))
        log "$((signal_ms / 1000)).$((signal_ms % 1000 / 100)) s from the signal to the end of the step"
    fi
    if [[ $phase == training ]]; then
        [[ ! -e $RUN_DIR/finished ]] || leave_with 0
        ! grep -qs '"exit_code": 2' "$RUN_DIR/failed" || code=2
    elif ((code == 0)); then
        leave_with 0 # a script without training has done its work
    fi
    if ((code == 2)); then
        log "failed: this must be fixed first, so it is not requeued"
    elif [[ -n $stop_reason ]]; then
        requeue
    elif ((code)) && [[ $phase == training ]] && find_bad_node; then
        stop_reason="a GPU of $bad_node failed"
        requeue
    elif ((code)); then
        say_what_failed "$code"
        code=$?
    fi
    leave_with "$code"
}

find_stop_reason() { # $1: exit code. This shell had no signal, but the steps had, or nodes were lost.
    [[ -z $stop_reason ]] || return
    if [[ $phase == training && (-e $RUN_DIR/interrupted || $1 == "$INTERRUPTED") ]]; then
        if has_stop_file && [[ $(read_stop_file) != "$ATTEMPT "* ]]; then
            log "stopped by $STOP_FILE, so it is not requeued: submit the same again to resume"
            leave_with 75
        fi
        stop_reason=$(grep -os '"reason": "[^"]*"' "$RUN_DIR/interrupted" | cut -d'"' -f4)
        : "${stop_reason:=a signal to the steps}"
        signal_ms=$(stat --format=%.3Y "$STOP_FILE" 2>/dev/null) signal_ms=${signal_ms/[.,]/} # as the locale writes it
    elif [[ $phase == evaluating && $1 == "$INTERRUPTED" ]]; then
        stop_reason="a signal to the steps"
    elif [[ $phase == preparing && $1 =~ ^(75|129|130|138|140|143)$ ]]; then # a preemption may reach the steps alone
        stop_reason="a signal to the step"
    elif [[ $phase == preparing ]] && (($1)) && read_record && [[ $(field NodeList) != "$begun_on" ]]; then
        stop_reason="a node was lost" # with --no-kill; Slurm has killed the step on the others
    elif [[ $phase != preparing && ($1 == "$STORE_LOST" || $1 == "$NODE_LOST") ]] && ! find_in_log "$OUT_OF_MEMORY" >/dev/null; then
        stop_reason="a node was lost"
    fi
}

leave_with() { # $1: exit code
    [[ -z ${progress_at_start:-} ]] || rm -f "$PROGRESS_DIR/.requeues.$JOB"
    rm -f "$RUN_DIR/.bad_nodes.$JOB"
    release_run_dir
    exit "$1"
}

find_in_log() { # PATTERN: its first line in this attempt's part of the log
    local number
    for number in "${!job_logs[@]}"; do
        tail -c "+$((job_log_starts[number] + 1))" "${job_logs[number]}" 2>/dev/null | grep -m 1 -E "$1" && return
    done
    return 1
}

# --- a GPU that failed: the job goes on without its node, three times at most

find_bad_node() { # sets bad_node, where a rank of this attempt wrote RUN_DIR/gpu_fault; 1: none did, or too often
    local marker=$RUN_DIR/gpu_fault before=$RUN_DIR/.bad_nodes.$JOB count
    grep -qs "\"attempt\": \"$ATTEMPT\"" "$marker" || return
    bad_node=$(sed -n '1s/.*"node": "\([^"]*\)".*/\1/p' "$marker")
    [[ -n $bad_node ]] || return
    count=$(grep -cs . "$before") || count=0
    if ((count >= 3)); then
        log "GPUs failed on $(paste -sd ' ' "$before") $bad_node, one after the other, so it is not requeued: is it the \
driver, or the program?"
        return 1
    fi
    echo "$bad_node" >>"$before"
}

exclude_bad_node() { # right after the requeue: Slurm changes ExcNodeList of pending jobs alone
    local before answer
    before=$(field ExcNodeList)
    [[ $before != "(null)" ]] || before=''
    if answer=$(LC_ALL=C timeout 30 scontrol update "JobId=$JOB" "ExcNodeList=${before:+$before,}$bad_node" 2>&1); then
        log "$bad_node is excluded from this job; tell who looks after it: see $RUN_DIR/metrics.jsonl, event gpu_fault"
        echo excluded >>"$RUN_DIR/gpu_fault"
    else
        log "$bad_node can't be excluded (${answer##*$'\n'})"
    fi
}

say_what_failed() { # $1: exit code of the step. Returns the job's.
    local asked killed
    asked=$(asked_memory)
    asked=${asked:-no --mem, so what the partition gives}
    if killed=$(find_in_log "$OUT_OF_MEMORY"); then
        log "memory ran out (${killed##*error: }). The job asked for $asked; $(more_memory)"
        return 2
    elif (($1 == 137)) || find_in_log "$KILLED" >/dev/null; then
        log "a process was killed by SIGKILL, which is how the kernel ends one when memory runs out. The job asked for \
$asked; if nobody sent that signal, $(more_memory)"
        return "$1"
    elif (($1 == GPU_FAULT)); then
        log "a GPU failed, on the node named above; not requeued. Submit the same with --exclude=NODE to resume on others."
        return "$1"
    fi
    log "failed with exit code $1; not requeued. $(what_comes_next)"
    return "$1"
}

OUT_OF_MEMORY='exceeded (job |step )?memory limit|oom[-_]kill|OOM Killed|: Out Of Memory|killed [0-9]+ since the start because host memory ran out'
KILLED='pipeline launch: rank .* was killed by SIGKILL[^;]*; see above' # not the times before

more_memory() {
    local amount example=''
    amount=$(asked_memory)
    if [[ $amount =~ ^(--mem[a-z-]*)=([0-9]+)([KMGT]?) ]]; then
        example=", e.g. ${BASH_REMATCH[1]}=$((2 * BASH_REMATCH[2]))${BASH_REMATCH[3]}"
    fi
    echo "submit the same again with more$example, or with fewer batches in memory: --data.prefetch 1"
}

what_comes_next() {
    if has_steps; then
        echo "Submit the same again to resume from the last checkpoint."
    elif [[ $phase == training ]]; then
        echo "No step was done."
    else
        echo "Nothing was started."
    fi
}

requeue() {
    local answer code
    remember_steps
    refuse_short_time_limit
    refuse_vain_requeue
    while read_record; do
        if [[ $(field Restarts) != "$RESTARTS" ]]; then
            log "Slurm has requeued the job" # it is this script's successor's now
            release_run_dir
            exit 0
        elif [[ ! $record =~ \ (JobState=RUNNING|Reason=TimeLimit)\  ]] && ! ended_by_preemption; then
            # a requeue would revive it
            log "cancelled: submit the same again to resume"
            leave_with 75
        fi
        read_end
        [[ ! $record =~ \ PreemptTime=[0-9] ]] || stop_reason="preempted by Slurm"
        release_run_dir
        if answer=$(LC_ALL=C timeout 90 scontrol requeue "$JOB" 2>&1); then
            log "requeued: $stop_reason"
            [[ -z ${bad_node:-} ]] || exclude_bad_node
            exit 0
        elif [[ ! $answer =~ (ontact|onnect|imed\ out|ommunication|emporarily|ransport|Zero\ Bytes) ]]; then
            log "Slurm refuses to requeue it (${answer##*$'\n'}); submit the same again to resume"
            leave_with 75
        fi
        sleep 3 # the controller was away: it may have heard or not
    done
    log "Slurm was not reached, or does not know the job any more, so it is not requeued; submit the same again to resume"
    leave_with 75
}

ended_by_preemption() { # PreemptMode=CANCEL without a GraceTime, not a scancel while a preemption's grace time runs
    [[ $(field PreemptTime) == 2* && $(field PreemptTime) == "$(field EndTime)" ]]
}

refuse_short_time_limit() { # the signal that announces the time limit came at once
    local limit
    limit=$(seconds_of "$TIME_LIMIT") || return 0
    if ((LEAD_S >= limit && $(date +%s) - begun_s < 75)) && [[ ! $record =~ \ PreemptTime=[0-9] ]]; then
        log "the time limit of $TIME_LIMIT is not longer than the $LEAD_S s by which Slurm's signal comes before it, so the job \
would be requeued without an end: submit it with a longer --time, or with both --signal and SBATCH_SIGNAL=B:USR1@SECONDS"
        leave_with 2
    fi
}
