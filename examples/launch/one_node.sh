#!/usr/bin/env bash
# Trains a recipe on this machine: examples/launch/one_node.sh RECIPE.yaml [group.field=value ...]
# RANKS: processes, one a GPU; by default one for each GPU of the machine.
# Paths count from the folder that it is started in.
set -euo pipefail
entry=$(cd "$(dirname "$0")/../.." && pwd)/pretrain_vita.py
ranks=${RANKS:-$(nvidia-smi --list-gpus | wc -l)}
exec "${PYTHON:-python}" -m megatron_vita.launch --standalone --nproc_per_node "$ranks" "$entry" "$@"
