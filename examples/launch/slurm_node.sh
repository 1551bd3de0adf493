#!/usr/bin/env bash
# The part of slurm.sbatch that runs on each node.
set -euo pipefail
if [ -n "${VENV:-}" ]; then
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi
# The signal is for the launcher; this shell waits for it to end.
trap : USR1
code=0
NODE_RANK=$SLURM_NODEID "$(dirname "$0")/many_nodes.sh" "$@" || code=$?
if [ "$code" -eq 75 ]; then
    touch "$PASSING.$SLURM_NODEID"
fi
exit "$code"
