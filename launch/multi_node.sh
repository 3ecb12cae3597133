#!/usr/bin/env bash
# Train on several nodes without a scheduler. See --help.
set -euo pipefail

usage() {
    cat <<'HELP'
Usage: bash launch/multi_node.sh --nodes N|MIN:MAX --head HOST[:PORT] --id NAME [options] [-- trainer's flags]

Run the same command on every node, in the project's folder on a shared file system. The nodes rendezvous at HOST, which
is one of them, and train as one job into runs/NAME.

  --nodes N         wait for N nodes
  --nodes MIN:MAX   start with MIN nodes or more; when one joins or leaves, all restart from the last checkpoint
  --head HOST:PORT  the node to rendezvous at, by a name that all nodes can resolve (default port: 29400)
  --id NAME         the job's name: the same on all nodes, different for each job
  --ranks N         ranks on this node (default: one per GPU, or four without GPUs)
  --max-restarts N  restarts from the last checkpoint when a rank fails (default: 3)
  -h, --help        show this text

The results do not depend on the number of nodes. To stop: Ctrl-C on one node. To continue: the same command again.
At the start a node waits ten minutes for the others. Later, without ranks, it waits 40 seconds and gives up (longer with
PET_RDZV_CONF=idle_timeout=600 in the environment).

  bash launch/multi_node.sh --nodes 2 --head node1 --id circles-1 -- --epochs 100
  bash launch/multi_node.sh --nodes 1:4 --head node1:29500 --id circles-2 -- --epochs 100 --checkpoint-seconds 10
HELP
}

refuse() {
    echo "error: $1 (bash launch/multi_node.sh --help shows more)" >&2
    exit 2
}

nodes='' head='' id='' ranks='' max_restarts=3
while (($#)); do
    case $1 in
        -h | --help) usage && exit ;;
        --) shift && break ;;
        --nodes | --head | --id | --ranks | --max-restarts) (($# > 1)) || refuse "$1 needs a value" ;;&
        --nodes) nodes=$2 ;;
        --head) head=$2 ;;
        --id) id=$2 ;;
        --ranks) ranks=$2 ;;
        --max-restarts) max_restarts=$2 ;;
        *) refuse "unknown argument '$1'; the trainer's flags go after --" ;;
    esac
    shift 2
done

[[ $nodes =~ ^([1-9][0-9]*)(:([1-9][0-9]*))?$ ]] || refuse "--nodes must be N or MIN:MAX, got '$nodes'"
((BASH_REMATCH[1] <= ${BASH_REMATCH[3]:-BASH_REMATCH[1]})) || refuse "--nodes must be N or MIN:MAX, got '$nodes'"
[[ $head =~ ^[^:/[:space:]]+(:[0-9]+)?$ ]] || refuse "--head must be HOST or HOST:PORT, got '$head'"
[[ $id =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ && $id != none ]] ||
    refuse "--id must be a name of letters, digits, '.', '_' or '-', beginning with a letter or digit, got '$id'"
[[ $ranks =~ ^([1-9][0-9]*)?$ ]] || refuse "--ranks must be a number above 0, got '$ranks'"
[[ $max_restarts =~ ^[0-9]+$ ]] || refuse "--max-restarts must be a number, got '$max_restarts'"
[[ $head == *:* ]] || head=$head:29400

# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
if [[ -z $ranks ]]; then
    ranks=$(python3 -c 'import torch; print(torch.cuda.device_count() or 4)')
fi

# Restarted ranks need a store of their own: torchrun's outlives them and keeps stale addresses.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# With --resume never: discard old results at the first start only, not whenever a node joins or leaves.
export DDP_CIRCLES_START="$HOSTNAME-$$-$EPOCHSECONDS"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's default, without its warning; --threads overrides it
# For the message of a stop.
printf -v DDP_CIRCLES_COMMAND ' %q' "$0" --nodes "$nodes" --head "$head" --id "$id" --ranks "$ranks" \
    --max-restarts "$max_restarts"
export DDP_CIRCLES_COMMAND="bash$DDP_CIRCLES_COMMAND --"

rendezvous=bounded # c10d, but it does not outlive its ranks
[[ $nodes != 1 ]] || rendezvous=loopback # no other machine can connect
exec torchrun --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts="$max_restarts" \
    --rdzv-backend="$rendezvous" --rdzv-endpoint="$head" --rdzv-id="$id" \
    -m ddp_circles.train "$@"
