# shellcheck shell=bash
# Sourced by the batch scripts. `supervise` runs the training step and decides what its end means for the job: done,
# back into the queue, once more, or failed. It goes by the file `status` in the run directory first, because torchrun
# makes every exit code a 1.

: "${max_retries:=3}" "${max_requeues:=100}" "${stop_asked:=}"

run_directory() { # run_directory DEFAULT [trainer's arguments]: where this run is kept
    local found=$1
    shift
    while (($#)); do
        case $1 in
            --run-dir | --run_dir) found=${2-} ;;
            --run-dir=* | --run_dir=*) found=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$found"
}

# The early warning of a time limit or a preemption. srun hands USR1 on to its tasks, but not while it is still starting
# them: so it is told again until it ends. TERM would make it kill the step at once.
trapped='' step=''
on_warning() {
    stop_asked=yes trapped=yes
    if [ -n "$step" ]; then pass_on &>/dev/null & fi
}
pass_on() { while kill -USR1 "$step"; do sleep 2; done; }
trap on_warning USR1
# There is no trap for TERM: with one, a job that its user cancelled could find its way back into the queue.

# What this job is called through all requeues and retries: with --resume never, only its first start discards.
export DDP_CIRCLES_START="slurm-$SLURM_JOB_ID"

say() { echo "[slurm] $(date '+%F %T') job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0}: $*"; }

run_step() { # run_step COMMAND...: wait for it through all interruptions; its exit code
    local code
    "$@" &
    step=$!
    if [ -n "$stop_asked" ]; then pass_on &>/dev/null & fi # warned between the two lines above
    while
        trapped=''
        wait "$step"
        code=$?
        [ -n "$trapped" ]
    do :; done
    step=''
    return "$code"
}

supervise() { # supervise RUN_DIR COMMAND...: run COMMAND, a step that trains in RUN_DIR; ends the job
    local status_file=$1/status retries=0 code word before
    shift
    while :; do
        before=$(stat -c '%i %y' "$status_file" 2>/dev/null)
        code=0
        [ -n "$stop_asked" ] || run_step "$@" || code=$?
        word=$(cat "$status_file" 2>/dev/null)
        # a word that was there before is the previous start's
        [ "$(stat -c '%i %y' "$status_file" 2>/dev/null)" != "$before" ] || [ "$code" = 0 ] || word="stale ${word:-none}"

        if [ "$word" = finished ]; then
            say "finished"
            exit 0
        elif [ -n "$stop_asked" ] || [ "$word" = stopped ] || [ "$code" = 0 ] || [ "$code" = 75 ]; then
            requeue
        elif [ "$code" = 2 ] || [ ! -e "$status_file" ]; then
            say "failed before training began (exit code $code): the reason is printed above; no retry"
            exit "$code"
        elif ((retries >= max_retries)); then
            say "failed (exit code $code, status $word) and gave up after $retries retries"
            exit "$code"
        fi
        retries=$((retries + 1))
        say "failed (exit code $code, status $word): retry $retries of $max_retries from the last checkpoint"
        sleep 2 # a node failure ends this script from outside within this time: the job is then back in the queue
    done
}

requeue() { # put this job back into the queue, where it waits for its next turn; ends the job
    if ((${SLURM_RESTART_COUNT:-0} >= max_requeues)); then
        say "stopped, and back in the queue $max_requeues times already: submit it again to continue"
        exit 75
    fi
    say "stopped by request: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || exit 75
    exit 0
}
