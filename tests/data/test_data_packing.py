"""Order and packing: each document once, none too much in a pack, windows kept, datasets mixed evenly."""

import numpy as np
import pytest

from megatron_vita.data.packing import Shuffler, first_fit_decreasing, pack_windows, sample_order


@pytest.mark.parametrize("seed", range(5))
def test_no_pack_overflows_and_none_could_have_been_spared_greedily(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 65, size=200) * 16
    packs = first_fit_decreasing(lengths, capacity=1024)
    fill = np.bincount(packs, weights=lengths)
    assert fill.max() <= 1024
    assert (fill > 0).all()
    assert (fill[:-1] + fill[1:] > 1024).all()  # first fit leaves no two neighbours that fit together
    assert len(fill) <= 11 / 9 * np.ceil(lengths.sum() / 1024) + 1


def test_documents_go_into_the_first_pack_with_room() -> None:
    assert first_fit_decreasing(np.array([16, 64, 48, 32, 16]), capacity=64).tolist() == [1, 0, 1, 2, 2]


def test_permutations_are_those_of_every_numpy() -> None:
    assert Shuffler((1234, 0)).permutation(8).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]
    assert Shuffler(None).permutation(3).tolist() == [0, 1, 2]


def test_every_sample_comes_once() -> None:
    order = sample_order([[3, 0, 5], [4], []], ratios=[1, 1, 1], shuffler=Shuffler((1, 0)))
    assert sorted(order) == list(range(12))


def test_samples_of_a_shard_stay_together() -> None:
    order = sample_order([[50] * 10], ratios=[1], shuffler=Shuffler((1, 0)))
    shards = order // 50
    assert (np.diff(shards) != 0).sum() == 9
    assert len(set(shards[::50])) == 10
    assert (np.diff(order) != 1).mean() > 0.9


def test_datasets_are_mixed_in_proportion_everywhere() -> None:
    order = sample_order([[100] * 9, [10] * 30], ratios=[1, 1], shuffler=Shuffler((1, 0)))
    second = (order >= 900).reshape(-1, 40).sum(axis=1)
    assert (np.abs(second - 10) <= 1).all()


def test_a_ratio_takes_a_share_or_goes_round_again() -> None:
    order = sample_order([[60, 40], [10]], ratios=[0.1, 2.5], shuffler=Shuffler((1, 0)))
    counts = np.bincount(order, minlength=110)
    assert (counts[:100].sum(), counts[:100].max()) == (10, 1)
    assert sorted(counts[100:]) == [2] * 5 + [3] * 5
    second = (order >= 100).reshape(-1, 7).sum(axis=1)
    assert (np.abs(second - 5) <= 1).all()


def test_packs_do_not_cross_windows() -> None:
    lengths = np.full(100, 16)
    order, packs = pack_windows(lengths, capacity=64, window=30, shuffler=Shuffler((1, 0)))
    assert sorted(order) == list(range(100))
    assert (np.diff(packs) >= 0).all()
    for pack in range(packs[-1] + 1):
        members = order[packs == pack]
        assert len(set(members // 30)) == 1
        assert (np.diff(members) > 0).all()


def test_packs_of_a_window_are_not_sorted_by_size() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, size=500) * 16
    order, packs = pack_windows(lengths, capacity=1024, window=500, shuffler=Shuffler((1, 0)))
    longest = np.array([lengths[order[packs == pack]].max() for pack in range(packs[-1] + 1)])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
