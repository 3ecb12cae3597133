#!/usr/bin/env bash
# two_nodes.sh FOLDER COMMAND...: run COMMAND on node1 and node2, two machines as far as the network can tell. When the
# file FOLDER/cut appears, nothing passes between them any more, without either noticing. Output and exit codes are in
# FOLDER/node1.log, FOLDER/node1.code and so on; the code is there as soon as the command has ended.
set -euo pipefail

if [ "$1" != inside ]; then # the switch has a network, and a kernel that ends everything with this script
    exec setpriv --pdeathsig KILL unshare --net --pid --fork --kill-child --mount-proc bash "$0" inside "$@"
fi
shift
export folder=$1
shift
printf '127.0.0.1 localhost\n198.51.100.1 node1\n198.51.100.2 node2\n' >"$folder/hosts"
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$folder/nsswitch.conf"

# shellcheck disable=SC2016 # expanded on the node
node='
    hostname "node$1"
    mount --bind "$folder/hosts" /etc/hosts
    mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
    ip link set lo up
    for _ in {1..300}; do ! ip link set eth0 up 2>/dev/null || break; sleep 0.1; done
    ip address add "198.51.100.$1/24" dev eth0
    code=0
    "${@:2}" >"$folder/node$1.log" 2>&1 || code=$?
    echo "$code" >"$folder/node$1.code"'

ip link add switch type bridge
ip link set switch up
for number in 1 2; do
    unshare --net --uts --mount bash -ec "$node" node "$number" "$@" &
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    ip link add "port$number" type veth peer name eth0 netns $!
    ip link set "port$number" master switch up
done
until [ -e "$folder/cut" ] || [ -z "$(jobs -r)" ]; do sleep 0.1; done
ip link set port2 nomaster
wait
