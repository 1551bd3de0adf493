"""Pending collectives are read from torch's record with their shapes and the ranks of their group."""

import pickle
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from megatron_vita import platform
from megatron_vita.platform.flight_recorder import members_of_groups, merge_traces, parse_trace


def entry(**fields: object) -> dict[str, object]:
    known = {"profiling_name": "gloo:all_reduce", "input_sizes": [[3, 4]], "state": "scheduled"}
    numbers = {"is_p2p": False, "collective_seq_id": 4, "p2p_seq_id": 0, "retired": False}
    numbers |= {"time_created_ns": 1}
    return known | numbers | {"process_group": ("0", "default_pg")} | fields


def pending_in_the_end() -> list[dict[str, Any]]:
    """Pending collectives, once those that are done are noted as such."""
    # gloo's thread notes the end of a collective after it has let the caller go.
    deadline = time.monotonic() + 10
    while platform.pending_collectives() and time.monotonic() < deadline:
        time.sleep(0.001)
    return platform.pending_collectives()


def test_members_of_the_default_group_and_of_others_are_known() -> None:
    members = {"0": [0, 1, 2], "5": [0, 2]}
    entries = [entry(), entry(process_group=("5", "TP"), is_p2p=True, p2p_seq_id=9)]
    world, other = parse_trace({"entries": entries}, members=members)
    assert (world["ranks"], world["number"], world["sizes"]) == ([0, 1, 2], 4, [[3, 4]])
    assert (other["ranks"], other["number"], other["group"]) == ([0, 2], 9, "5 TP")


def test_what_is_completed_is_left_out() -> None:
    entries = [entry(state="completed"), entry(retired=True)]
    assert parse_trace({"entries": entries}, members={}) == []


def test_records_of_nccl_and_of_other_groups_are_one_list_by_time() -> None:
    nccl = {"entries": [entry(profiling_name="nccl:all_reduce", time_created_ns=5)]}
    others = [entry(time_created_ns=3), entry(profiling_name="gloo:gather", time_created_ns=9)]
    merged = merge_traces([{"entries": others}, nccl], members={})
    assert [pending["name"] for pending in merged] == [
        "gloo:all_reduce", "nccl:all_reduce", "gloo:gather",
    ]  # fmt: skip


def test_groups_without_this_rank_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    platform.initialize_process()
    # What torch notes of a group on the ranks that are not in it.
    ranks_of_groups: dict[Any, Any] = _world.pg_group_ranks
    monkeypatch.setitem(ranks_of_groups, dist.GroupMember.NON_GROUP_MEMBER, {1: 0})
    assert [0] in members_of_groups().values()
    assert pending_in_the_end() == []


def test_torch_records_what_is_read_here() -> None:
    """The fields that torch's record has; a new version may rename them."""
    platform.initialize_process()
    # A later group takes the place of the first one in torch's list of members.
    dist.destroy_process_group(dist.new_group([0], group_desc="another"))
    dist.all_reduce(torch.ones(2))
    dump = torch._C._distributed_c10d._dump_fr_trace  # type: ignore[attr-defined]
    trace = pickle.loads(dump(includeStackTraces=False))
    for recorded in trace["entries"]:
        recorded |= {"state": "scheduled", "retired": False}  # as if it had not completed
    last = parse_trace(trace, members=members_of_groups())[-1]
    assert last["name"].endswith("all_reduce")
    assert (last["ranks"], last["sizes"]) == ([0], [[2]])
    assert pending_in_the_end() == []
