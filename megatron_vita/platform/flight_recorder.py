"""Collectives that this rank has begun and not completed, from torch's flight recorder.

torch records each collective of its process groups, on NCCL and gloo, in a ring buffer. Reading it
takes part in none of them.
"""

import os
import pickle
from typing import Any

import torch

SIZE = "TORCH_FR_BUFFER_SIZE"
OLD_SIZE = "TORCH_NCCL_TRACE_BUFFER_SIZE"
ENTRIES = "2000"
DEFAULT = "default_pg"


def record_collectives() -> None:
    """Let torch record collectives; to be called before the first process group is made."""
    if OLD_SIZE not in os.environ:
        os.environ.setdefault(SIZE, ENTRIES)


def pending_collectives() -> list[dict[str, Any]]:
    """Return the collectives that this rank waits for, in the order in which it began them.

    Returns:
        For each: name, number in its group, sizes of its inputs, group, and the group's ranks.
    """
    distributed: Any = torch._C._distributed_c10d
    if torch.cuda.is_available():
        dump = distributed._dump_nccl_trace(includeStackTraces=False)
    else:
        dump = distributed._dump_fr_trace(includeStackTraces=False)
    return parse_trace(pickle.loads(dump))


def parse_trace(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the collectives of a record that are not completed, as `pending_collectives` does."""
    ranks = {name: of["ranks"] for name, of in trace.get("pg_config", {}).items()}
    pending = []
    for entry in trace.get("entries", []):
        if entry["state"] == "completed" or entry["retired"]:
            continue
        name, description = entry["process_group"]
        # The record lists the members of the default group under no name.
        listed = ranks.get("" if description == DEFAULT and name not in ranks else name, "")
        pending.append(
            {
                "name": entry["profiling_name"],
                "number": entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
                "sizes": entry["input_sizes"],
                "group": f"{name} {description}",
                "ranks": _numbers(listed),
            }
        )
    return pending


def _numbers(listed: str) -> list[int]:
    """Parse the ranks of a group, as the recorder writes them: [0, 1]."""
    return [int(part) for part in listed.strip("[]").split(",") if part.strip()]
