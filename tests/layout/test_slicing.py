"""Slices of a pack cover it exactly, balance causal work, and features find their placeholders."""

import itertools

import pytest
import torch

from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.layout.slicing import RankLayout, slice_pack
from megatron_vita.layout.zigzag import (
    offsets_in_document,
    owners,
    positions_of_rank,
    rank_chunks,
)

LENGTHS = [16, 64, 0, 16, 32]
BOUNDS = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
TOTAL = sum(LENGTHS)


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_every_position_is_held_once(cp: int) -> None:
    held = [positions_of_rank(BOUNDS, cp_size=cp, cp_rank=rank) for rank in range(cp)]
    assert sorted(torch.cat(held).tolist()) == list(range(TOTAL))
    assert {len(positions) for positions in held} == {TOTAL // cp}


@pytest.mark.parametrize(("cp", "rank"), [(2, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
def test_each_chunk_of_a_rank_sees_its_document_up_to_its_own_last_key(cp: int, rank: int) -> None:
    gathered = torch.cat([positions_of_rank(BOUNDS, cp_size=cp, cp_rank=r) for r in range(cp)])
    chunks = rank_chunks(BOUNDS, cp_size=cp, cp_rank=rank)
    own = positions_of_rank(BOUNDS, cp_size=cp, cp_rank=rank).split(chunks.query_lengths.tolist())
    seen = gathered[chunks.key_rows].split(chunks.key_lengths.tolist())
    assert len(own) == len(seen) == 2 * sum(length > 0 for length in LENGTHS)
    for queries, keys in zip(own, seen, strict=True):
        start = max(start for start in BOUNDS.tolist() if start <= int(queries[0]))
        assert keys.tolist() == list(range(start, int(queries[-1]) + 1))
        assert queries.tolist() == keys[-len(queries) :].tolist()


def test_rank_holds_chunks_r_and_its_mirror_of_each_document() -> None:
    assert positions_of_rank(torch.tensor([0, 8, 16]), cp_size=2, cp_rank=0).tolist() == [
        0,
        1,
        6,
        7,
        8,
        9,
        14,
        15,
    ]
    assert positions_of_rank(torch.tensor([0, 8, 16]), cp_size=2, cp_rank=1).tolist() == [
        2,
        3,
        4,
        5,
        10,
        11,
        12,
        13,
    ]


@pytest.mark.parametrize("cp", [2, 4])
def test_causal_work_is_the_same_for_every_rank(cp: int) -> None:
    owner = owners(BOUNDS, cp)
    offset = offsets_in_document(BOUNDS)
    work = torch.zeros(cp, dtype=torch.int64).index_add_(0, owner, offset + 1)
    assert len(set(work.tolist())) == 1


def test_positions_restart_at_each_document() -> None:
    assert offsets_in_document(torch.tensor([0, 3, 5])).tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("together", [False, True], ids=["own tiles", "tiles together over TP"])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_feature_rows_reach_the_rank_that_holds_their_placeholder(
    tp: int, cp: int, together: bool
) -> None:
    rows_per_tile = 4
    placements = torch.tensor([1, 6, 20, 30, 75, 81, 110])
    frames = torch.tensor([0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    ids = torch.arange(TOTAL)
    labels = torch.full((TOTAL,), -100)
    layouts = [
        RankLayout(tp_size=tp, tp_rank=t, cp_size=cp, cp_rank=c, vision_tensor_parallel=together)
        for c in range(cp)
        for t in range(tp)
    ]
    slices = [
        slice_pack(
            ids,
            labels=labels,
            cu_seqlens=BOUNDS,
            placements=placements,
            frames=frames,
            rows_per_tile=4,
            layout=layout,
        )
        for layout in layouts
    ]
    # stands for the feature row's content
    position = placements[:, None] + torch.arange(rows_per_tile)
    outgoing = []
    for layout, part in zip(layouts, slices, strict=True):
        assigned = assign_tiles(frames, layout.tile_ranks)[layout.tile_rank]
        mine = position[assigned].flatten()[part.route.send_order]
        outgoing.append(mine.split(part.route.send_counts))
    for layout, part in zip(layouts, slices, strict=True):
        peers = [
            i for i, other in enumerate(layouts) if not together or other.tp_rank == layout.tp_rank
        ]
        sent = [outgoing[peer][layout.tile_rank] for peer in peers]
        assert list(map(len, sent)) == part.route.receive_counts
        received = torch.cat(sent)
        share = part.input_ids.unflatten(0, (tp, -1))[layout.tp_rank]
        assert share[part.route.target_rows].tolist() == received.tolist()
    reached = torch.cat([part.route.target_rows for part in slices])
    assert len(reached) == position.numel()
