"""Tiles are dealt in contiguous, equal runs; packs of a step to replicas by cost."""

import itertools

import numpy as np
import pytest
import torch

from megatron_vita.layout.dealing import deal_packs, deal_tiles


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
    hands = deal_tiles(is_frame, ranks)
    assert sorted(torch.cat(hands).tolist()) == list(range(images + frames))
    assert len(hands) == ranks
    kinds = [[int(is_frame[hand].sum()), len(hand) - int(is_frame[hand].sum())] for hand in hands]
    for counts in (*zip(*kinds, strict=True), list(map(sum, kinds))):
        assert max(counts) - min(counts) <= 1
    for kind in (True, False):
        run = [tile for hand in hands for tile in hand[is_frame[hand] == kind].tolist()]
        assert run == sorted(run)
        assert len(run) == (frames if kind else images)


def test_at_most_one_image_and_one_video_less_than_ranks_are_opened_by_two_ranks() -> None:
    generator = np.random.default_rng(0)
    for _ in range(100):
        medium = np.repeat(np.arange(40), generator.integers(1, 14, 40))
        is_frame = torch.from_numpy(generator.random(40) < 0.3)[medium]
        hands = deal_tiles(is_frame, 8)
        for kind in (True, False):
            opened = [set(medium[hand[is_frame[hand] == kind].numpy()]) for hand in hands]
            assert sum(map(len, opened)) - len(set.union(*opened)) <= 8 - 1


@pytest.mark.parametrize(("packs", "ranks"), [(8, 1), (8, 8), (64, 8), (512, 64), (12, 3)])
def test_each_pack_is_dealt_once_and_replicas_have_equally_many(packs: int, ranks: int) -> None:
    costs = np.random.default_rng(packs).lognormal(0, 1, packs)
    hands = deal_packs(costs, ranks)
    assert sorted(itertools.chain.from_iterable(hands)) == list(range(packs))
    assert {len(hand) for hand in hands} == {packs // ranks}
    assert hands == deal_packs(list(costs), ranks)


def test_the_best_deal_of_few_packs_is_found() -> None:
    """Checked against all ways of dealing."""
    generator = np.random.default_rng(1)
    for _ in range(50):
        costs = generator.integers(1, 100, 8)
        found = max(costs[hand].sum() for hand in deal_packs(costs, 2))
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
        sums = [costs[hand].sum() for hand in deal_packs(costs, 8)]
        assert max(sums) / np.mean(sums) <= 1.03
