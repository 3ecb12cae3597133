#!/bin/bash
# task.sh COMMAND...: runs between srun and torchrun on each node.
#
# Slurm signals the process that srun started, not torchrun's workers. torchrun is killed by USR1, and on TERM it gives
# its workers 30 seconds and fails. So signals are caught here: USR1 or USR2 (the warning before a time limit or
# preemption) and TERM (preemption without warning, requeue, cancel) all become USR1 to the workers, which write a
# checkpoint and exit; then torchrun exits too.
asked=''
trap 'asked=yes' USR1 USR2 TERM

# Slurm may signal more than its own child, and torchrun must not get that signal. With proctrack/pgid it goes to the
# process group, so torchrun has its own session; with proctrack/linuxproc it goes to every descendant, so torchrun
# ignores USR1 and USR2. Outside the group KILL no longer reaches torchrun; the death signal, if setpriv has it, replaces
# it.
apart=(setsid)
if setpriv --pdeathsig KILL true 2>/dev/null; then apart+=(setpriv --pdeathsig KILL); fi
(
    trap '' USR1 USR2
    exec "${apart[@]}" "$@"
) &
torchrun=$!

catches_usr1() { # catches_usr1 PID: true once it has a handler; until then USR1 would kill it or be lost
    local mask
    mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null)
    (((16#${mask:-0} >> 9) & 1))
}

wait "$torchrun"
code=$?
[ -n "$asked" ] || exit "$code"

# signal each worker once: one that is about to exit has no handler any more
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
exit 0 # a requested stop is no failure; `status` in the run directory tells the rest
