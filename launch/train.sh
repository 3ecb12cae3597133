#!/usr/bin/env bash
# Train on this machine: one rank per GPU, or four ranks on the CPU; RANKS=N overrides the number. All arguments go to
# the trainer.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "$0")/setup.sh"
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || gpus=4
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun's default, without its warning; --threads overrides it
DDP_CIRCLES_COMMAND="${RANKS:+RANKS=$RANKS }bash $(printf %q "$0")" # for the message of a stop
export DDP_CIRCLES_COMMAND
id=$(</proc/sys/kernel/random/uuid)
exec torchrun --rdzv-backend=loopback --rdzv-endpoint=localhost --rdzv-id="$id" --nproc-per-node="${RANKS:-$gpus}" -m ddp_circles.train "$@"
