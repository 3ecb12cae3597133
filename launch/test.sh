#!/usr/bin/env bash
# Run the tests, in several lanes at once. All arguments go to pytest; with --all, the thorough tests run too; with --gpu,
# those of tests/gpu alone, on CUDA and one after the other.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
cd "$project"

# Tests that play several nodes open ports on all addresses. Where that is allowed, all tests run in a network of their
# own that nobody can reach: it has this machine's addresses, and no name server to wait for.
apart() { # apart COMMAND...
    # shellcheck disable=SC2016 # expanded by the inner shell
    addresses=$(hostname -I) unshare --net --mount bash -ec '
        ip link set lo up
        for address in $addresses; do ip address add "$address" dev lo; done
        names=$VIRTUAL_ENV/nsswitch.conf # it stays: over a file that is gone, no test could mount another
        sed "s/^hosts:.*/hosts: files/" /etc/nsswitch.conf >"$names"
        mount --bind "$names" /etc/nsswitch.conf
        exec "$@"' apart "$@"
}
tests=(python3 -m pytest --numprocesses=auto "$@")
if apart true &>/dev/null; then
    apart "${tests[@]}"
else
    exec "${tests[@]}"
fi
