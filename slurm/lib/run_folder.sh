# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables
# The run folder: one job at a time, still there after a requeue, progress between requeues, the stop file.

# --- one job at a time; `pipeline train` locks the folder too, this says so once, and before anything is touched

owner_of_run_dir() { readlink "$RUN_DIR/.job"; } # a link needs no room on a full disk, and is made by one job alone

claim_run_dir() {
    local owner state before='' problem tries=60
    refuse_lost_run_dir
    mkdir -p "$RUN_DIR" || fail "RUN_DIR=$RUN_DIR can't be made: give another folder"
    while ! problem=$(LC_ALL=C ln -s "$JOB" "$RUN_DIR/.job" 2>&1); do
        owner=$(owner_of_run_dir) || {
            [[ -w $RUN_DIR ]] || fail "RUN_DIR=$RUN_DIR can't be written: give another folder"
            ((tries-- > 0)) || fail "no link can be made in RUN_DIR=$RUN_DIR (${problem##*: }): make room there, also for the \
number of files, or give another folder"
            sleep 1 # released meanwhile, or a disk that is away
            continue
        }
        [[ $owner != "$JOB" ]] || break # of an attempt that was killed
        state=$(ask_slurm squeue --noheader --states=all --job "$owner" --format=%T)
        case $state in
            RUNNING | SUSPENDED | STOPPED | CONFIGURING | RESIZING | SIGNALING | STAGE_OUT)
                log "job $owner is at work in $RUN_DIR: submit with --dependency=afterany:$owner, or give another RUN_DIR"
                exit 2
                ;;
            COMPLETING)
                [[ -z $stop_reason ]] || leave 1
                [[ $before == COMPLETING ]] || log "waiting for the end of job $owner in $RUN_DIR"
                sleep 2
                ;;
            *) take_over "$owner" ;; # it was killed
        esac
        before=$state
    done
    claimed=yes
}

take_over() { # $1: owner, which has ended. Of several jobs that see it, one removes its link.
    mv -T "$RUN_DIR/.job" "$RUN_DIR/.job.$JOB" 2>/dev/null || return
    if [[ $(readlink "$RUN_DIR/.job.$JOB") != "$1" ]]; then # another job was quicker: put its link back
        ln -s "$(readlink "$RUN_DIR/.job.$JOB")" "$RUN_DIR/.job" 2>/dev/null
    fi
    rm -f "$RUN_DIR/.job.$JOB"
}

release_run_dir() {
    if [[ -n ${claimed:-} && $(owner_of_run_dir) == "$JOB" ]]; then
        rm -f "$RUN_DIR/.job"
    fi
}

# --- a run folder that is gone: Slurm remembers in the job's comment that steps were written

STEPS_WRITTEN="steps written by the pipeline"

has_steps() { [[ -e $RUN_DIR/metrics.jsonl ]] && grep -q -m 1 '"kind": *"train"' "$RUN_DIR/metrics.jsonl"; }

remember_steps() { # once there are some; 1: not yet
    local comment
    has_steps || return 1
    [[ -z ${remembered:-} ]] || return 0
    comment=$(squeue --noheader --job "$JOB" --format=%k 2>/dev/null) || return 1
    [[ $comment != "(null)" ]] || comment=''
    if [[ $comment != *"$STEPS_WRITTEN"* ]]; then
        scontrol update "JobId=$JOB" "Comment=${comment:+$comment; }$STEPS_WRITTEN" 2>/dev/null || return 1
    fi
    remembered=yes
}

remember_steps_soon() {
    trap - USR1 USR2 TERM INT HUP
    until has_steps; do sleep 2; done
    until remember_steps; do sleep 60; done # a site may not allow it
}

refuse_lost_run_dir() {
    ((RESTARTS)) && [[ ! -e $RUN_DIR/metrics.jsonl ]] || return 0
    if [[ $(ask_slurm squeue --noheader --job "$JOB" --format=%k) == *"$STEPS_WRITTEN"* ]]; then
        log "the run is gone: this job has written steps to $RUN_DIR before, and there is no metrics.jsonl now. Put the folder \
back (was it moved? is it on a disk that $(hostname) does not see?) and submit the same again; to start from step 0, submit \
with another RUN_DIR"
        exit 2
    fi
}

# --- requeues without progress: what is requeued again and again and never gets anywhere is broken

if ! declare -F progress >/dev/null; then # scripts without a run folder have their own by now
    progress() { # what has been done so far, in a word that changes with it
        printf '%s\n' "$RUN_DIR"/checkpoints/step-*/meta.json | tail -n 1
    }
fi

count_requeues() { # reads and writes PROGRESS_DIR/.requeues.JOB: progress at the start, how often it was the same, why
    local file=$PROGRESS_DIR/.requeues.$JOB before=''
    mkdir -p "$PROGRESS_DIR" || fail "$PROGRESS_DIR can't be made"
    in_vain=0 in_vain_reason=''
    progress_at_start=$(progress | cksum)
    if ((RESTARTS)) && [[ -e $file ]]; then
        read -r before in_vain in_vain_reason <"$file"
        if [[ $before == "${progress_at_start// /_}" ]]; then in_vain=$((in_vain + 1)); else in_vain=0 in_vain_reason=''; fi
    fi
    note_requeue
    if ((in_vain >= 3)); then
        fail "requeued $in_vain times without a new step: see above what ended it, fix that, and submit the same again"
    fi
}

note_requeue() { # $1: why this attempt ends
    printf '%s %s %s\n' "${progress_at_start// /_}" "$in_vain" "${1:-}" >"$PROGRESS_DIR/.requeues.$JOB"
} 2>/dev/null

refuse_vain_requeue() { # a whole time limit that brought nothing, twice
    local now left
    [[ -n ${progress_at_start:-} ]] || return 0
    now=$(date +%s) left=$((job_end_s - $(date +%s)))
    ((job_end_s == 0 || left > LEAD_S + 90)) && return
    if [[ $(progress | cksum) == "$progress_at_start" ]]; then
        if [[ $in_vain_reason == time* ]]; then
            log "the time limit of $TIME_LIMIT was spent twice without progress ($((now - begun_s)) s this time), so it is not \
requeued: give a longer --time, and submit the same again"
            leave_with 2
        fi
        note_requeue time
    fi
}

# --- the stop file. The disk may be full: a link needs no room, an empty file neither.

has_stop_file() { [[ -e $STOP_FILE || -L $STOP_FILE ]]; }

read_stop_file() { readlink "$STOP_FILE" || cat "$STOP_FILE"; } 2>/dev/null

write_stop_file() { # $1: text
    local new=$RUN_DIR/.stop.$JOB
    { { echo "$1" >"$new" && mv -f "$new" "$STOP_FILE"; } || ln -s "$1" "$STOP_FILE" || : >>"$STOP_FILE"; } 2>/dev/null
}

# --- the program

code_files() { # their digests; what was submitted itself is Slurm's own copy
    cd "$PIPELINE_HOME" || return
    find pipeline slurm -type f \( -name '*.py' -o -name '*.sh' -o -name '*.yaml' \) -print0 | sort -z | xargs -0 sha256sum
}

say_if_code_changed() { # since the run began
    local before=$RUN_DIR/.code changed
    if [[ ! -s $before ]]; then
        { (code_files) >"$before.$JOB" && mv "$before.$JOB" "$before"; } 2>/dev/null
        return
    fi
    mapfile -t changed < <(diff "$before" <(code_files) | sed -n 's/^[<>] [0-9a-f]*  //p' | sort -u)
    ((${#changed[@]} < 4)) || changed=("${changed[@]:0:3}" "and $((${#changed[@]} - 3)) more files")
    ((${#changed[@]} == 0)) || log "the code in $PIPELINE_HOME has changed since the run began: ${changed[*]}"
}
