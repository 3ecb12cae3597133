# shellcheck shell=bash
# Sourced by the batch scripts. `supervise` runs the training step; when it ends, the job is finished, requeued, retried
# or failed. The file `status` in the run directory decides before the exit code, which torchrun always turns into 1.

: "${max_retries:=3}" "${max_requeues:=100}" "${stop_asked:=}"

[[ $SLURM_JOB_ID =~ ^[0-9]+$ ]] || { # it becomes the name of a folder
    echo "error: SLURM_JOB_ID must be a number, as Slurm sets it, got ${SLURM_JOB_ID@Q}" >&2
    exit 2
}

run_directory() { # run_directory DEFAULT [TRAINER'S FLAGS...]: print the run directory
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

# The early warning of a time limit or preemption. srun forwards USR1 to its tasks, but not while it is still starting
# them, so the signal is repeated until srun ends. TERM would make srun kill the step at once.
trapped='' step=''
on_warning() {
    stop_asked=yes trapped=yes
    if [ -n "$step" ]; then pass_on &>/dev/null & fi
}
pass_on() { while kill -USR1 "$step"; do sleep 2; done; }
trap on_warning USR1
# No trap for TERM: with one, a job cancelled by its user might be requeued.

# One name for all requeues and retries of this job: with --resume never, only the first start discards old results.
export DDP_CIRCLES_START="slurm-$SLURM_JOB_ID"

say() { echo "[slurm] $(date '+%F %T') job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0}: $*"; }

run_step() { # run_step COMMAND...: run it, wait through all signals, return its exit code
    local code
    "$@" &
    step=$!
    if [ -n "$stop_asked" ]; then pass_on &>/dev/null & fi # the warning came between the two lines above
    while
        trapped=''
        wait "$step"
        code=$?
        [ -n "$trapped" ]
    do :; done
    step=''
    return "$code"
}

supervise() { # supervise RUN_DIR COMMAND...: run COMMAND, which trains in RUN_DIR, then end the job
    local status_file=$1/status retries=0 code word before
    shift
    while :; do
        before=$(stat -c '%i %y' "$status_file" 2>/dev/null)
        code=0
        [ -n "$stop_asked" ] || run_step "$@" || code=$?
        word=$(head -c 20 "$status_file" 2>/dev/null | tr -cd '[:alnum:]') # printed below: nothing but a word
        # a status file that this step did not write is left over from an earlier start
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
        sleep 2 # after a node failure Slurm kills this script within this time, and requeues the job
    done
}

requeue() { # put this job back into the queue and end it
    if ((${SLURM_RESTART_COUNT:-0} >= max_requeues)); then
        say "stopped, and back in the queue $max_requeues times already: submit it again to continue"
        exit 75
    fi
    say "stopped by request: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || exit 75
    exit 0
}
