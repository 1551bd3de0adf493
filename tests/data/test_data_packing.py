"""Order and packing: each document once, none too much in a pack, windows kept, datasets mixed
evenly."""

import numpy as np
import pytest

from megatron_vita.data.planning.packing import (
    Shuffler,
    best_fit_decreasing,
    epoch_samples,
    group_by_cost,
    interleave,
    pack_windows,
    sample_order,
)


@pytest.mark.parametrize("seed", range(5))
def test_no_pack_overflows_and_none_could_have_been_spared_greedily(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 65, size=200) * 16
    packs = best_fit_decreasing(lengths, capacity=1024)
    fill = np.bincount(packs, weights=lengths)
    assert fill.max() <= 1024
    assert (fill > 0).all()
    # first fit leaves no two neighbours that fit together
    assert (fill[:-1] + fill[1:] > 1024).all()
    assert len(fill) <= 11 / 9 * np.ceil(lengths.sum() / 1024) + 1


def test_documents_go_into_the_first_pack_with_room() -> None:
    assert best_fit_decreasing(np.array([16, 64, 48, 32, 16]), capacity=64).tolist() == [
        1,
        0,
        1,
        2,
        2,
    ]


def test_permutations_are_those_of_every_numpy() -> None:
    assert Shuffler((1234, 0)).permutation(8).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]
    assert Shuffler(None).permutation(3).tolist() == [0, 1, 2]


def test_every_sample_comes_once() -> None:
    order = sample_order(
        [[3, 0, 5], [4], []], ratios=[1, 1, 1], caps=[0, 0, 0], shuffler=Shuffler((1, 0))
    )
    assert sorted(order) == list(range(12))


def test_samples_of_a_shard_stay_together() -> None:
    order = sample_order([[50] * 10], ratios=[1], caps=[0], shuffler=Shuffler((1, 0)))
    shards = order // 50
    assert (np.diff(shards) != 0).sum() == 9
    assert len(set(shards[::50])) == 10
    assert (np.diff(order) != 1).mean() > 0.9


def test_datasets_are_mixed_in_proportion_everywhere() -> None:
    order = sample_order(
        [[100] * 9, [10] * 30], ratios=[1, 1], caps=[0, 0], shuffler=Shuffler((1, 0))
    )
    second = (order >= 900).reshape(-1, 40).sum(axis=1)
    assert (np.abs(second - 10) <= 1).all()


def test_a_ratio_takes_a_share_or_goes_round_again() -> None:
    order = sample_order(
        [[60, 40], [10]], ratios=[0.1, 2.5], caps=[0, 0], shuffler=Shuffler((1, 0))
    )
    counts = np.bincount(order, minlength=110)
    assert (counts[:100].sum(), counts[:100].max()) == (10, 1)
    assert sorted(counts[100:]) == [2] * 5 + [3] * 5
    second = (order >= 100).reshape(-1, 7).sum(axis=1)
    assert (np.abs(second - 5) <= 1).all()


def test_packs_hold_documents_of_a_window_and_of_those_left_over_before() -> None:
    lengths = np.full(100, 16)
    order, packs = pack_windows(lengths, capacity=64, window=30, shuffler=Shuffler((1, 0)))
    assert sorted(order) == list(range(100))
    assert (np.diff(packs) >= 0).all()
    assert (np.bincount(packs) == 4).all()  # no pack is left half full where a window ends
    for pack in range(packs[-1] + 1):
        windows = order[packs == pack] // 30
        assert windows.max() - windows.min() <= 1
        assert (np.diff(order[packs == pack]) > 0).all()


@pytest.mark.parametrize("capacity", [16384, 32768, 131072])
def test_packs_are_full_on_a_realistic_mix(capacity: int) -> None:
    """Chats, images of 1 to 13 tiles, and films: real tokens over T, at the default alignment."""
    draw = np.random.default_rng(0)
    kind = draw.random(60_000)
    count = 60_000
    tokens = np.exp(draw.normal(5.7, 0.8, count)) + (kind > 0.25) * 260 * draw.choice(
        [1, 3, 5, 7, 9, 13], count
    )
    frames = np.minimum(np.exp(draw.normal(4.2, 0.7, count)), capacity // 258 - 2)
    tokens = np.minimum(np.where(kind > 0.9, 258 * frames + 100, tokens), capacity).astype(np.int64)
    padded = -(-tokens // 16) * 16
    _, packs = pack_windows(padded, capacity=capacity, window=4096, shuffler=Shuffler((1, 0)))
    assert tokens.sum() / (capacity * (packs[-1] + 1)) >= 0.99


def test_packs_that_nothing_can_fill_do_not_wait_for_ever() -> None:
    lengths = np.full(1000, 600)
    order, packs = pack_windows(lengths, capacity=1000, window=100, shuffler=Shuffler((1, 0)))
    assert sorted(order) == list(range(1000))
    assert len(np.unique(packs)) == 1000
    first_half = order[packs < 500]
    assert (first_half < 600).mean() > 0.9


def test_packs_of_a_step_have_like_costs_and_each_pack_one_number() -> None:
    draw = np.random.default_rng(0)
    costs = draw.lognormal(0, 1, 1003)
    numbers = group_by_cost(costs, size=8, shuffler=Shuffler((1, 0)))
    assert sorted(numbers) == list(range(1003))
    grouped = np.empty_like(costs)
    grouped[numbers] = costs
    steps = grouped[:1000].reshape(-1, 8)
    before = costs[:1000].reshape(-1, 8)
    assert np.median(steps.max(1) / steps.mean(1)) < 1.05
    assert np.median(before.max(1) / before.mean(1)) > 1.5
    # steps are not sorted by cost
    assert abs(np.corrcoef(steps.mean(1), np.arange(125))[0, 1]) < 0.3
    assert (np.abs(numbers - np.arange(1003)) < 8 * 64).all()


def test_groups_of_like_cost_are_whole_steps_where_an_epoch_begins_within_one() -> None:
    costs = np.random.default_rng(0).lognormal(0, 1, 1003)
    numbers = group_by_cost(costs, size=8, first=5, shuffler=Shuffler((1, 0)))
    assert sorted(numbers) == list(range(1003))
    assert numbers[:5].tolist() == [0, 1, 2, 3, 4]
    grouped = np.empty_like(costs)
    grouped[numbers] = costs
    steps = grouped[5 : 5 + 992].reshape(-1, 8)
    assert np.median(steps.max(1) / steps.mean(1)) < 1.05


def test_lists_of_packs_are_spread_over_one_another() -> None:
    lists = [(np.arange(6), np.array([0, 0, 1, 2, 2, 3])), (6 + np.arange(2), np.array([0, 1]))]
    documents, packs = interleave(lists)
    assert sorted(documents) == list(range(8))
    groups = [set(documents[packs == pack].tolist()) for pack in range(6)]
    assert sorted(map(sorted, groups)) == [[0, 1], [2], [3, 4], [5], [6], [7]]
    places = [groups.index({6}), groups.index({7})]
    assert places[0] < 3 <= places[1]


def test_a_cap_limits_what_an_epoch_takes() -> None:
    order = sample_order([[60, 40], [10]], ratios=[1, 3], caps=[25, 12], shuffler=Shuffler((1, 0)))
    assert ((order < 100).sum(), (order >= 100).sum()) == (25, 12)


def test_packs_of_a_window_are_not_sorted_by_size() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, size=500) * 16
    order, packs = pack_windows(lengths, capacity=1024, window=500, shuffler=Shuffler((1, 0)))
    longest = np.array([lengths[order[packs == pack]].max() for pack in range(packs[-1] + 1)])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


@pytest.mark.parametrize(
    ("samples", "ratio", "cap", "taken"),
    [(100, 0.29, 0, 29), (100, 1.15, 0, 115), (7, 0.5, 0, 3), (100, 2.0, 150, 150)],
)
def test_shares_are_exact_and_rounded_down(
    samples: int, ratio: float, cap: int, taken: int
) -> None:
    assert epoch_samples(samples, ratio=ratio, cap=cap) == taken
