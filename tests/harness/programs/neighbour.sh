#!/usr/bin/env bash
# neighbour.sh PORT...: print `PORT answers` or `PORT is silent`, as seen from another machine in this one's network.
# The other machine is a network namespace behind a virtual cable.
set -euo pipefail
cable=test$$
unshare --net sleep 60 &
machine=$!
trap 'kill "$machine"; ip link delete "$cable" 2>/dev/null' EXIT
until [ "$(readlink "/proc/$machine/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
there=(nsenter "--net=/proc/$machine/ns/net")

ip link add "$cable" type veth peer name far
ip link set far netns "$machine"
ip address add 198.51.100.1/24 dev "$cable"
ip link set "$cable" up
"${there[@]}" ip address add 198.51.100.2/24 dev far
"${there[@]}" ip link set far up
for port in "$@"; do
    if "${there[@]}" timeout 5 bash -c "</dev/tcp/198.51.100.1/$port" 2>/dev/null; then
        echo "$port answers"
    else
        echo "$port is silent"
    fi
done
