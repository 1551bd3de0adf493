"""Pending collectives are read from torch's record with their shapes and the ranks of their group."""

import pickle

import torch
import torch.distributed as dist

from megatron_vita import platform
from megatron_vita.platform.flight_recorder import parse_trace


def entry(**fields: object) -> dict[str, object]:
    known = {"profiling_name": "gloo:all_reduce", "input_sizes": [[3, 4]], "state": "scheduled"}
    numbers = {"is_p2p": False, "collective_seq_id": 4, "p2p_seq_id": 0, "retired": False}
    return known | numbers | {"process_group": ("0", "default_pg")} | fields


def test_members_of_the_default_group_and_of_others_are_known() -> None:
    config = {"": {"ranks": "[0, 1, 2]"}, "5": {"ranks": "[0, 2]"}}
    entries = [entry(), entry(process_group=("5", "TP"), is_p2p=True, p2p_seq_id=9)]
    world, other = parse_trace({"pg_config": config, "entries": entries})
    assert (world["ranks"], world["number"], world["sizes"]) == ([0, 1, 2], 4, [[3, 4]])
    assert (other["ranks"], other["number"], other["group"]) == ([0, 2], 9, "5 TP")


def test_what_is_completed_is_left_out() -> None:
    entries = [entry(state="completed"), entry(retired=True)]
    assert parse_trace({"pg_config": {}, "entries": entries}) == []


def test_torch_records_what_is_read_here() -> None:
    """The fields that torch's record has; a new version may rename them."""
    platform.initialize_process()
    dist.all_reduce(torch.ones(2))
    dump = torch._C._distributed_c10d._dump_fr_trace  # type: ignore[attr-defined]
    trace = pickle.loads(dump(includeStackTraces=False))
    for recorded in trace["entries"]:
        recorded |= {"state": "scheduled", "retired": False}  # as if it had not completed
    last = parse_trace(trace)[-1]
    assert last["name"].endswith("all_reduce")
    assert (last["ranks"], last["sizes"]) == ([0], [[2]])
    assert platform.pending_collectives() == []
