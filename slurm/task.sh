#!/bin/bash
# task.sh COMMAND...: stands between srun and torchrun on each node.
#
# Slurm signals the process that srun started, not torchrun's workers; and torchrun dies of USR1, and on TERM gives its
# workers 30 seconds and fails. So the signal ends here: USR1 (the warning before a time limit or a preemption) and
# TERM (preemption without a warning, requeue, cancel) both become USR1 for the workers, which write a checkpoint and
# leave; then torchrun does.
asked=''
trap 'asked=yes' USR1 TERM

# Where Slurm signals more than its own child, torchrun is still spared: a session of its own keeps out what goes to the
# process group (proctrack/pgid), and it ignores USR1 (proctrack/linuxproc signals every descendant). The death signal,
# unknown to old versions of setpriv, makes up for the KILL that no longer comes with the group.
apart=(setsid)
if setpriv --pdeathsig KILL true 2>/dev/null; then apart+=(setpriv --pdeathsig KILL); fi
(
    trap '' USR1
    exec "${apart[@]}" "$@"
) &
torchrun=$!

catches_usr1() { # catches_usr1 PID: whether its handler is there; before that, a signal would be lost, or kill
    local mask
    mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)
    (((16#${mask:-0} >> 9) & 1))
}

wait "$torchrun"
code=$?
[ -n "$asked" ] || exit "$code"

# once each: a worker that is about to leave has no handler any more
told=()
while kill -0 "$torchrun" 2>/dev/null; do
    for worker in $(pgrep --parent "$torchrun"); do
        if [ -z "${told[worker]-}" ] && catches_usr1 "$worker"; then
            kill -USR1 "$worker" 2>/dev/null
            told[worker]=yes
        fi
    done
    sleep 0.2
done
exit 0 # it ended because it was asked to; what it left is in the run directory
