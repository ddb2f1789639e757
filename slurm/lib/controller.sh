# shellcheck shell=bash disable=SC2034,SC2154 # the files share their variables
# Questions to Slurm's controller. No answer is no answer: it is asked again for as long as the allocation lasts.

record='' # what `scontrol show job` last said of this job, in one line
job_end_s=0 # when the allocation ends, in seconds since 1970; 0: not known

ask_slurm() { # COMMAND ...: its output, once the controller answers; 1: it answers that there is no such job; 2: never
    local answer said=''
    while :; do # its output is marked: beside it there may be a warning, as of a library that can't be preloaded
        if answer=$({ LC_ALL=C timeout 90 "$@" 2>&3 | sed 's/^/=/' && ((PIPESTATUS[0] == 0)); } 3>&1); then
            printf '%s\n' "$answer" | sed -n 's/^=//p'
            return 0
        elif [[ $answer == *"Invalid job id"* ]]; then
            return 1
        elif ((job_end_s && $(date +%s) >= job_end_s)); then
            log "no answer from Slurm's controller until the end of the allocation: ${answer##*$'\n'}"
            return 2
        fi
        [[ -n $said ]] || log "no answer from Slurm's controller, asking again: ${answer##*$'\n'}"
        said=yes
        sleep 3
    done
}

read_record() { # sets `record`; returns what ask_slurm does
    local answer code
    answer=$(ask_slurm scontrol show job --details --oneliner "$SLURM_JOB_ID")
    code=$?
    record=$(printf '%s\n' "$answer" | grep "^JobId=$SLURM_JOB_ID ") || record='' # <<< needs room in /tmp
    ((code)) || [[ -n $record ]] || return 1
    return "$code"
}

field() { # NAME: its value in `record`, up to the next blank
    [[ " $record" =~ \ $1=([^ ]*) ]] && printf '%s\n' "${BASH_REMATCH[1]}"
}

seconds_of() { # a time limit as Slurm writes it, [DAYS-]HH:MM:SS; nothing where there is none
    [[ $1 =~ ^(([0-9]+)-)?([0-9]+):([0-9]+):([0-9]+)$ ]] || return 1
    local days=${BASH_REMATCH[2]:-0} hours=${BASH_REMATCH[3]} minutes=${BASH_REMATCH[4]} seconds=${BASH_REMATCH[5]}
    echo $((((10#$days * 24 + 10#$hours) * 60 + 10#$minutes) * 60 + 10#$seconds))
}

read_end() { # sets job_end_s, which an operator may change at any time
    job_end_s=$(date -d "$(field EndTime)" +%s 2>/dev/null) || job_end_s=0
}

describe_job() { # who this job is, by Slurm's word: its environment may hold the variables of the job it came from
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        echo "this is a batch script: submit it with sbatch" >&2
        exit 2
    fi
    if [[ ${SLURM_TASK_PID:-} == "$$" && ${SLURM_PROCID:-0} != 0 ]]; then # each task of `srun slurm/resnet152.sh`
        echo "task $SLURM_PROCID of srun ends here: one copy of the script is enough, that of task 0; in salloc, start it" \
            "without srun: bash $0" >&2
        exit 0
    fi
    ATTEMPT=$SLURM_JOB_ID
    unset SLURM_CLUSTERS SLURM_TIME_FORMAT "${!SCONTROL_@}" "${!SQUEUE_@}" "${!SCANCEL_@}" # how the user likes answers
    if ! read_record; then
        log "Slurm does not know job $SLURM_JOB_ID: submit the script with sbatch"
        exit 2
    fi
    read_end
    JOB=$SLURM_JOB_ID ARRAY_TASK=''
    if [[ $record =~ ^JobId=[0-9]+\ ArrayJobId=([0-9]+)\ ArrayTaskId=([0-9]+)\  ]]; then
        ARRAY_TASK=${BASH_REMATCH[2]}
        JOB=${BASH_REMATCH[1]}_$ARRAY_TASK # the plain id of an array's last task is the whole array's
    fi
    RESTARTS=$(field Restarts)
    ATTEMPT=$SLURM_JOB_ID.$RESTARTS
    TIME_LIMIT=$(field TimeLimit)
    begun_on=$(field NodeList)
    begun_s=$(date +%s)
    forget_other_jobs
}

#: What slurmd sets for every batch job. All else that begins with SLURM_ may be another job's, or an option that srun
#: would take for its own, such as SLURM_MEM_PER_CPU or SLURM_EXPORT_ENV.
OWN_VARIABLES=" SLURM_CONF SLURM_JWT SLURM_CLUSTER_NAME SLURM_WORKING_CLUSTER SLURM_JOB_ID SLURM_JOBID SLURM_JOB_NAME \
SLURM_JOB_NODELIST SLURM_NODELIST SLURM_JOB_NUM_NODES SLURM_NNODES SLURM_JOB_CPUS_PER_NODE SLURM_CPUS_ON_NODE \
SLURM_TASKS_PER_NODE SLURM_JOB_PARTITION SLURM_JOB_ACCOUNT SLURM_JOB_QOS SLURM_JOB_USER SLURM_JOB_UID SLURM_JOB_GID \
SLURM_SUBMIT_DIR SLURM_SUBMIT_HOST SLURM_TOPOLOGY_ADDR SLURM_TOPOLOGY_ADDR_PATTERN SLURM_NODE_ALIASES "

forget_other_jobs() {
    local name own=$OWN_VARIABLES
    [[ $record != *GRES=gpu* && $record != *gres/gpu* ]] || own+="SLURM_GPUS_ON_NODE SLURM_JOB_GPUS "
    [[ -z $ARRAY_TASK ]] || own+="${!SLURM_ARRAY_*} "
    for name in "${!SLURM_@}" "${!SRUN_@}"; do
        [[ $own == *" $name "* || $name == SRUN_OPTIONS ]] || unset "$name"
    done
    for name in "${!TORCHELASTIC_@}" "${!PMI_@}" "${!PMIX_@}" "${!GROUP_@}" "${!ROLE_@}"; do
        unset "$name"
    done
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT STOP_FILE RENDEZVOUS RENDEZVOUS_ID
    [[ $RESTARTS == 0 ]] || export SLURM_RESTART_COUNT=$RESTARTS
}

asked_memory() { # what the job asked for, as it was asked
    local amount
    amount=$(field MinMemoryNode) && echo "--mem=$amount" && return
    amount=$(field MinMemoryCPU) && echo "--mem-per-cpu=$amount"
}

kill_steps() { # `scancel --signal=KILL JOB` would cancel the job
    local steps try
    for try in {1..12}; do
        mapfile -t steps < <(squeue --steps --noheader --job "$JOB" --format=%i 2>/dev/null | grep '\.[0-9]*$')
        ((${#steps[@]} == 0)) || scancel --signal=KILL "${steps[@]}"
        sleep 5
        [[ -n $step_pid ]] && kill -0 "$step_pid" 2>/dev/null || return 0
        log "the steps are still there, asking again (try $try)"
    done
    kill -KILL "$step_pid" 2>/dev/null # srun; slurmd ends the steps with the job
}
