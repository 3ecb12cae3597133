#!/usr/bin/env bash
# pods.sh HOSTS COMMAND...: run COMMAND as the two ranks of a job, in the pods pod-0 and pod-1: each has a host name and
# a network of its own, with HOSTS in place of /etc/hosts. A virtual cable joins 198.51.100.1 and 198.51.100.2. Ends
# with the sum of the exit codes.
set -euo pipefail

if [ "$1" != inside ]; then # a kernel that ends everything with this script
    exec setpriv --pdeathsig KILL unshare --pid --fork --kill-child --mount-proc bash "$0" inside "$@"
fi
hosts=$2
shift 2
pods=()
for rank in 0 1; do
    # shellcheck disable=SC2016 # expanded by the inner shell
    RANK=$rank WORLD_SIZE=2 hosts=$hosts unshare --net --uts --mount bash -ec '
        hostname "pod-$RANK"
        mount --bind "$hosts" /etc/hosts
        ip link set lo up
        for _ in {1..300}; do ! ip link show cable &>/dev/null || break; sleep 0.1; done
        ip address add "198.51.100.$((RANK + 1))/24" dev cable
        ip link set cable up
        exec "$@"' pod "$@" &
    pods+=("$!")
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
done
ip link add cable netns "${pods[0]}" type veth peer name cable netns "${pods[1]}"
codes=0
for pod in "${pods[@]}"; do
    wait "$pod" || codes=$((codes + $?))
done
exit "$codes"
