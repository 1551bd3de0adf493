"""Tiles are dealt in contiguous, equal runs; packs of a step to replicas by cost."""

import itertools

import numpy as np
import pytest
import torch

from megatron_vita.layout.assignment import assign_packs, assign_tiles


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
    ("images", "frames"), [(0, 0), (1, 0), (0, 7), (63, 5), (13, 4064), (500, 499)]
)
def test_every_tile_is_dealt_once_in_runs_of_each_kind_and_numbers_differ_by_at_most_one(
    images: int, frames: int, ranks: int
) -> None:
    is_frame = (
        torch.rand(images + frames, generator=torch.Generator().manual_seed(1)).argsort() < frames
    )
    assignments = assign_tiles(is_frame, ranks)
    assert sorted(torch.cat(assignments).tolist()) == list(range(images + frames))
    assert len(assignments) == ranks
    kinds = [
        [int(is_frame[assigned].sum()), len(assigned) - int(is_frame[assigned].sum())]
        for assigned in assignments
    ]
    for counts in (*zip(*kinds, strict=True), list(map(sum, kinds))):
        assert max(counts) - min(counts) <= 1
    for kind in (True, False):
        run = [
            tile
            for assigned in assignments
            for tile in assigned[is_frame[assigned] == kind].tolist()
        ]
        assert run == sorted(run)
        assert len(run) == (frames if kind else images)


def test_at_most_one_image_and_one_video_less_than_ranks_are_opened_by_two_ranks() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        medium = np.repeat(np.arange(40), generator.integers(1, 14, 40))
        is_frame = torch.from_numpy(generator.random(40) < 0.3)[medium]
        assignments = assign_tiles(is_frame, 8)
        for kind in (True, False):
            opened = [
                set(medium[assigned[is_frame[assigned] == kind].numpy()])
                for assigned in assignments
            ]
            assert sum(map(len, opened)) - len(set.union(*opened)) <= 8 - 1


@pytest.mark.parametrize(("packs", "ranks"), [(8, 1), (8, 8), (64, 8), (512, 64), (12, 3)])
def test_each_pack_is_dealt_once_and_replicas_have_equally_many(packs: int, ranks: int) -> None:
    costs = np.random.default_rng(packs).lognormal(0, 1, packs)
    assignments = assign_packs(costs.tolist(), ranks)
    assert sorted(itertools.chain.from_iterable(assignments)) == list(range(packs))
    assert {len(assigned) for assigned in assignments} == {packs // ranks}
    assert assignments == assign_packs(list(costs), ranks)


def test_the_best_deal_of_few_packs_is_found() -> None:
    """Checked against all ways of dealing."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        costs = generator.integers(1, 100, 8)
        found = max(costs[assigned].sum() for assigned in assign_packs(costs.tolist(), 2))
        best = min(
            max(costs[list(h)].sum(), costs.sum() - costs[list(h)].sum())
            for h in itertools.combinations(range(8), 4)
        )
        assert found <= best * 1.05


def test_cost_per_replica_differs_by_less_than_three_percent_at_eight_packs_each() -> None:
    """Costs as packs of 128K tokens have them: from many short documents to one long one, with few
    or many tiles."""
    generator = np.random.default_rng(2)
    for _ in range(20):
        costs = generator.lognormal(0, 0.5, 64)
        sums = [costs[assigned].sum() for assigned in assign_packs(costs.tolist(), 8)]
        assert max(sums) / np.mean(sums) <= 1.03
