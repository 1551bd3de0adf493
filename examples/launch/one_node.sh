#!/usr/bin/env bash
# Trains a recipe on this machine: examples/launch/one_node.sh RECIPE.yaml [group.field=value ...]
# RANKS: processes, one a GPU; by default one for each GPU of the machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
ranks=${RANKS:-$(nvidia-smi --list-gpus | wc -l)}
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "$ranks" pretrain_vita.py "$@"
