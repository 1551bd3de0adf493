"""The rank that holds up a job is told from those that wait for it."""

from typing import Any

import pytest

from megatron_vita.supervise.hang import (
    READING_AHEAD,
    RankView,
    find_culprits,
    summarize,
    unrecorded_wait,
)


def collective(name: str, number: int, sizes: list[list[int]], ranks: list[int]) -> dict[str, Any]:
    return {"name": name, "number": number, "sizes": sizes, "group": "dp", "ranks": ranks}


REDUCE = collective("all_reduce", 7, [[3, 4]], [0, 1, 2])
LATER = collective("all_reduce", 8, [[2]], [0, 1, 2])


def view(rank: int, **fields: Any) -> RankView:
    state = {"step": 5, "micro_batch": 2, "phase": "backward", "keys": [f"s{rank}"], "idle": 60.0}
    return RankView(rank=rank, host="a", pid=rank, state=state | fields.pop("state", {}), **fields)


@pytest.mark.parametrize(
    ("inspected", "reason"),
    [
        ({"state": "T"}, "is stopped (SIGSTOP)"),
        ({"state": "t"}, "is stopped by a debugger"),
        ({"state": ""}, "is gone"),
        ({"state": "Z"}, "has died"),
        ({"state": "D"}, "does not answer: it waits for a disk or a file system"),
        ({"state": "D", "pressure": 60.0}, "its host waits for memory 60 % of the time, it swaps"),
        ({"state": "S", "pressure": 60.0}, "its host waits for memory 60 % of the time, it swaps"),
        ({"state": "R"}, "does not answer: native code holds its interpreter"),
        ({}, "does not answer, nor does any rank of its host"),
    ],
)
def test_a_silent_rank_is_named_by_what_its_process_does(
    inspected: dict[str, Any], reason: str
) -> None:
    waiting = [view(0, pending=[REDUCE]), view(1, is_silent=True, inspected=inspected)]
    (culprit,) = find_culprits([*waiting, view(2, pending=[REDUCE])])
    assert culprit.rank == 1
    assert reason in culprit.reason


@pytest.mark.parametrize("phase", ["loading", "forward", "saving", "optimizer"])
def test_a_rank_outside_of_collectives_holds_up_those_inside(phase: str) -> None:
    stuck = view(2, state={"phase": phase}, place="read (loader.py:3)")
    (culprit,) = find_culprits([view(0, pending=[REDUCE]), view(1, pending=[REDUCE]), stuck])
    assert culprit.rank == 2
    assert "read (loader.py:3)" in culprit.reason


def test_a_rank_that_goes_on_is_not_taken_for_the_one_that_waits() -> None:
    views = [view(0, state={"idle": 1.0}), view(1), view(2, pending=[REDUCE])]
    assert [culprit.rank for culprit in find_culprits(views)] == [1]


def test_the_rank_whose_collective_is_another_than_that_of_most_is_named() -> None:
    views = [view(0, pending=[REDUCE]), view(1, pending=[LATER]), view(2, pending=[REDUCE])]
    (culprit,) = find_culprits(views)
    assert culprit.rank == 1
    assert "all_reduce 8 [2] of dp while others are in all_reduce 7 [3, 4] of dp" in culprit.reason


def test_a_rank_waits_in_the_oldest_of_its_collectives() -> None:
    """NCCL's are begun ahead: of those queued behind, ranks may have begun different numbers."""
    views = [view(0, pending=[REDUCE, LATER]), view(1, pending=[REDUCE]), view(2, pending=[LATER])]
    (culprit,) = find_culprits(views)
    assert culprit.rank == 2


def test_reading_ahead_holds_up_no_step_that_does_not_wait_for_its_pack() -> None:
    ahead = collective("all_reduce", 3, [[1]], [0, 1]) | {"group": f"9 {READING_AHEAD}"}
    stuck = view(1, pending=[ahead], state={"phase": "forward"}, place="acquire (a.py:1)")
    (culprit,) = find_culprits([view(0, pending=[ahead, REDUCE]), stuck])
    assert culprit.rank == 1
    assert "stays in forward" in culprit.reason
    loading = {"phase": "loading"}
    reader = view(1, state=loading, place="get (queue.py:1)")
    (culprit,) = find_culprits([view(0, pending=[ahead], state=loading), reader])
    assert "waits for its loader" in culprit.reason


def test_a_pack_of_a_validation_is_told_as_such() -> None:
    stuck = view(1, state={"phase": "loading", "held_out": True}, place="get (queue.py:1)")
    assert "step 5, validation, micro-batch 2, loading" in summarize([stuck], seconds=60)


def test_the_rank_that_waits_in_another_group_is_named() -> None:
    other = collective("recv", 1, [[5]], [1, 2]) | {"group": "pp"}
    views = [view(0, pending=[REDUCE]), view(1, pending=[other]), view(2, pending=[REDUCE])]
    assert 1 in [culprit.rank for culprit in find_culprits(views)]


def test_a_wait_that_torch_does_not_record_shows_in_the_frames() -> None:
    (wait,) = unrecorded_wait("recv (distributed/distributed_c10d.py:2662) < f (a.py:1)")
    views = [view(0, pending=[REDUCE]), view(1, pending=[wait]), view(2, pending=[REDUCE])]
    (culprit,) = find_culprits(views)
    assert culprit.rank == 1
    assert culprit.reason == "is in recv while others wait for it in all_reduce 7 [3, 4] of dp"
    assert unrecorded_wait("read (loader.py:3) < recv (distributed/distributed_c10d.py:1)") == []


def test_the_summary_has_rank_host_step_pack_phase_and_samples() -> None:
    line = summarize([view(0, pending=[REDUCE]), view(1, place="f (a.py:1)")], seconds=60)
    assert line == (
        "no progress for 60 s: rank 1 on a stays in backward (at f (a.py:1)); step 5, micro-batch 2, backward; "
        "samples s1"
    )


def test_ranks_that_all_wait_in_one_collective_are_told_as_such() -> None:
    line = summarize([view(rank, pending=[REDUCE]) for rank in range(3)], seconds=60)
    assert "no rank differs: all are in step 5, micro-batch 2, backward, in all_reduce 7" in line
