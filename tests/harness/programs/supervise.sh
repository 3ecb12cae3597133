# supervise.sh PROJECT STEP: supervise a training step, given as shell text, that is run in this folder and counted.
# shellcheck shell=bash
export max_retries=1
# shellcheck source=slurm/supervise.sh
source "$1/slurm/supervise.sh"
export SUPERVISOR=$BASHPID
supervise . bash -c "echo >>steps; $2"
