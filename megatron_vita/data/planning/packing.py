"""Shuffling and packing of samples, as pure functions of sizes and a seed.

Random numbers are raw 64-bit words of PCG64, whose stream NumPy keeps in every version, and orders
are stable sorts by them, so that a plan does not depend on the version of NumPy.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

WELL_FILLED = 0.99
GROUP_BLOCK = 64  # groups of packs that are sorted by cost together


class Shuffler:
    """Permutations from a seed; identity permutations if the seed is None."""

    def __init__(self, seed: Sequence[int] | None) -> None:
        self._bits = None
        if seed is not None:
            self._bits = np.random.PCG64(np.random.SeedSequence(list(seed)))

    def permutation(self, length: int) -> np.ndarray:
        """Draw a permutation of range(length)."""
        if self._bits is None:
            return np.arange(length)
        return np.argsort(self._bits.random_raw(length), kind="stable")


def epoch_samples(samples: int, *, ratio: float, cap: int) -> int:
    """Number of a dataset's samples in an epoch."""
    # The margin makes 29 of 100 samples at ratio 0.29, whose product in floats is less.
    taken = int(samples * ratio + 1e-6)
    if cap:
        return min(taken, cap)
    return taken


def sample_order(
    shard_sizes: list[list[int]],
    *,
    ratios: Sequence[float],
    caps: Sequence[int],
    shuffler: Shuffler,
) -> np.ndarray:
    """Order the samples of an epoch, as indices into the datasets' shards laid end to end.

    In each dataset shards are shuffled, then samples inside each shard, so that neighbours come
    from few files. Datasets are then interleaved evenly: each is spread over the epoch, so that
    every window has the mix of the epoch.

    Args:
        shard_sizes: number of samples of each shard of each dataset.
        ratios: fraction of each dataset's samples in an epoch, the first of its order; above 1 its
            order is repeated.
        caps: maximum number of each dataset's samples; 0: no limit.
        shuffler: source of the permutations.
    """
    orders = []
    places = []  # of each sample on a scale of 0 to 1 over the epoch
    first = 0
    for sizes, ratio, cap in zip(shard_sizes, ratios, caps, strict=True):
        bounds = np.cumsum([first, *sizes])
        order = [
            bounds[shard] + shuffler.permutation(sizes[shard])
            for shard in shuffler.permutation(len(sizes))
        ]
        taken = epoch_samples(sum(sizes), ratio=ratio, cap=cap)
        # np.resize repeats the order for ratios above 1.
        orders.append(np.resize(np.concatenate([np.zeros(0, np.int64), *order]), taken))
        # Sorting all samples by these interleaves the datasets evenly.
        places.append((np.arange(taken) + 0.5) / max(taken, 1))
        first = int(bounds[-1])
    if not orders:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]


def best_fit_decreasing(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """Pack of each document: longest first, each into the fullest pack that has room.

    No length may exceed `capacity`.
    """
    packs = np.empty(len(lengths), dtype=np.int64)
    rooms: list[tuple[int, int]] = []  # room and number of packs that are not full, ascending
    count = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        # Rooms are sorted: the first one that is large enough is the tightest.
        fullest = bisect.bisect_left(rooms, (length, -1))
        if fullest < len(rooms):
            room, pack = rooms.pop(fullest)
        else:
            room = capacity
            pack = count
            count += 1
        packs[document] = pack
        # Full packs are dropped, which keeps the list short.
        if room > length:
            bisect.insort(rooms, (room - length, pack))
    return packs


def pack_windows(
    lengths: np.ndarray, *, capacity: int, window: int, shuffler: Shuffler
) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents, given in their shuffled order, window by window.

    Documents of packs that are poorly filled are carried over to the next window. The packs of a
    window are shuffled.

    Returns:
        order: indices of the documents sorted by pack.
        packs: pack of each document in that order.
    """
    orders = [np.zeros(0, np.int64)]
    packs = [np.zeros(0, np.int64)]
    first_pack = 0
    waiting = np.zeros(0, dtype=np.int64)
    for start, stop in itertools.pairwise([*range(0, len(lengths), window), len(lengths)]):
        documents = np.concatenate([waiting, np.arange(start, stop)])
        pack = best_fit_decreasing(lengths[documents], capacity=capacity)
        # Best fit leaves the last packs of a window half empty: their documents may fill packs of
        # the next window. The last window keeps all.
        stays = np.ones(len(documents), dtype=bool)
        if stop < len(lengths):
            stays = ~_carried(lengths[documents], pack, capacity=capacity, most=window // 2)
        waiting = documents[~stays]
        documents = documents[stays]
        pack = pack[stays]
        pack = np.unique(pack, return_inverse=True)[1]
        count = int(pack.max(initial=-1)) + 1
        # Unshuffled, the packs of a window would go from long documents to short ones.
        pack = shuffler.permutation(count)[pack]
        order = np.argsort(pack, kind="stable")
        orders.append(documents[order])
        packs.append(first_pack + pack[order])
        first_pack += count
    return np.concatenate(orders), np.concatenate(packs)


def _carried(lengths: np.ndarray, packs: np.ndarray, *, capacity: int, most: int) -> np.ndarray:
    """Mark the documents to carry over to the next window.

    These are at most `most` documents of the emptiest packs, none of a pack fuller than
    WELL_FILLED.
    """
    fill = np.bincount(packs, weights=lengths) / capacity
    members = np.bincount(packs)
    emptiest = np.argsort(fill, kind="stable")
    leaves = np.zeros(len(fill), dtype=bool)
    leaves[emptiest] = (np.cumsum(members[emptiest]) <= most) & (fill[emptiest] < WELL_FILLED)
    # At least one pack stays, so that each window makes progress.
    leaves[emptiest[-1:]] = False
    return leaves[packs]


def interleave(packed: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Merge lists of packs, each as of `pack_windows`, spreading each evenly over the result."""
    counts = [int(packs.max(initial=-1)) + 1 for _, packs in packed]
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    numbers = np.empty(len(places), dtype=np.int64)
    numbers[np.argsort(places, kind="stable")] = np.arange(len(places))
    firsts = np.cumsum([0, *counts])
    documents = np.concatenate([order for order, _ in packed])
    packs = np.concatenate(
        [numbers[first + packs] for first, (_, packs) in zip(firsts, packed, strict=False)]
    )
    order = np.argsort(packs, kind="stable")
    return documents[order], packs[order]


def group_by_cost(
    costs: np.ndarray, *, size: int, first: int = 0, shuffler: Shuffler
) -> np.ndarray:
    """Renumber packs so that `size` consecutive packs have similar costs.

    Groups begin at pack `first`. Packs stay within GROUP_BLOCK groups of their old number, in which
    groups are shuffled. Packs beyond the last full group keep their number.
    """
    numbers = np.arange(len(costs))
    block = GROUP_BLOCK * size
    end = first + (len(costs) - first) // size * size
    # Blocks bound how far a pack moves from its shuffled position.
    for start in range(first, end, block):
        stop = min(start + block, end)
        ascending = start + np.argsort(costs[start:stop], kind="stable")
        groups = ascending.reshape(-1, size)
        numbers[groups[shuffler.permutation(len(groups))].reshape(-1)] = np.arange(start, stop)
    return numbers
