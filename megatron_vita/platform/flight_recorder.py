"""Collectives that this rank has begun and not completed, from torch's flight recorder.

torch records each collective of its process groups in ring buffers, one of NCCL's groups and one of
all others. Reading them takes part in no collective.
"""

import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.distributed_c10d import _world


def pending_collectives() -> list[dict[str, Any]]:
    """Return the collectives that this rank waits for, in the order in which it began them.

    The first is the one that the rank waits in: the later ones of its group are queued behind it.

    Returns:
        For each: name, number in its group, sizes of its inputs, group, the group's ranks, and the
        nanosecond of its beginning.
    """
    distributed: Any = torch._C._distributed_c10d
    dumps = [distributed._dump_fr_trace(includeStackTraces=False)]
    if torch.cuda.is_available():
        dumps.append(distributed._dump_nccl_trace(includeStackTraces=False))
    return merge_traces((pickle.loads(dump) for dump in dumps), members=members_of_groups())


def members_of_groups() -> dict[str, list[int]]:
    """Return the ranks of this process's groups by name.

    The record's own list has them for NCCL alone: gloo's groups are all listed under one name.
    """
    names = _world.pg_names
    return {
        names[group]: sorted(ranks)
        for group, ranks in _world.pg_group_ranks.items()
        if group in names  # not the mark for groups that this rank is no member of
    }


def merge_traces(
    traces: Iterable[dict[str, Any]], *, members: Mapping[str, list[int]]
) -> list[dict[str, Any]]:
    """Return the collectives of all records that are not completed, by their beginning.

    members: ranks of each group by its name.
    """
    pending = [collective for trace in traces for collective in parse_trace(trace, members=members)]
    return sorted(pending, key=lambda collective: collective["began"])


def parse_trace(trace: dict[str, Any], *, members: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """Return the collectives of one record that are not completed, as `merge_traces` does."""
    pending = []
    for entry in trace.get("entries", []):
        if entry["state"] == "completed" or entry["retired"]:
            continue
        name, description = entry["process_group"]
        pending.append(
            {
                "name": entry["profiling_name"],
                "number": entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"],
                "sizes": entry["input_sizes"],
                "group": f"{name} {description}",
                "ranks": members.get(name, []),
                "began": entry["time_created_ns"],
            }
        )
    return pending
