#!/usr/bin/env bash
# Run the tests, in several lanes at once. All arguments go to pytest; with --all, the thorough tests run too.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
cd "$project"
tests=(python3 -m pytest --numprocesses=auto "$@")

# Tests that play several nodes open ports on all addresses. Where it is allowed, the tests run in a network of their
# own, which nobody can reach and in which this machine keeps its addresses.
if addresses=$(hostname -I) && unshare --net ip link set lo up 2>/dev/null; then
    # shellcheck disable=SC2016 # expanded by the inner shell
    exec unshare --net bash -c '
        ip link set lo up
        for address in $1; do ip address add "$address" dev lo; done
        exec "${@:2}"' network "$addresses" "${tests[@]}"
fi
exec "${tests[@]}"
