#!/usr/bin/env bash
# Trains a recipe on several machines; start it on each: examples/launch/many_nodes.sh RECIPE.yaml [group.field=value ...]
# NODES: how many machines; NODE_RANK: which one this is, from 0; HEAD: name or address of machine 0, HEAD_PORT: a free
# port of it. RANKS: processes a machine, one a GPU; by default one for each GPU.
# Paths count from the folder that it is started in.
set -euo pipefail
entry=$(cd "$(dirname "$0")/../.." && pwd)/pretrain_vita.py
: "${NODES:?set NODES to the number of machines}"
: "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0}"
: "${HEAD:?set HEAD to the name or address of machine 0}"
ranks=${RANKS:-$(nvidia-smi --list-gpus | wc -l)}
exec "${PYTHON:-python}" -m megatron_vita.launch --nnodes "$NODES" --node_rank "$NODE_RANK" \
    --master_addr "$HEAD" --master_port "${HEAD_PORT:-29500}" --nproc_per_node "$ranks" "$entry" "$@"
