"""In which order samples come and which share a pack: pure functions of sizes and a seed.

Random numbers are raw 64-bit words of PCG64, whose stream numpy keeps the same in every version;
orders are stable sorts by them. So a plan does not depend on the numpy that made it.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np

WELL_FILLED = 0.99
GROUP_BLOCK = 64  # groups of packs among which like costs are looked for


class Shuffler:
    """Permutations from a seed; the identity if the seed is None."""

    def __init__(self, seed: Sequence[int] | None) -> None:
        self._bits = None if seed is None else np.random.PCG64(np.random.SeedSequence(list(seed)))

    def permutation(self, length: int) -> np.ndarray:
        """A permutation of range(length)."""
        if self._bits is None:
            return np.arange(length)
        return np.argsort(self._bits.random_raw(length), kind="stable")


def taken_of(samples: int, *, ratio: float, cap: int) -> int:
    """How many of a dataset's samples an epoch takes: 0.29 of 100 are 29, though their product in
    floats is less."""
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
    """An epoch's order of samples, as positions in the datasets' shards laid end to end.

    `shard_sizes` holds the samples of each shard of each dataset, of which an epoch takes the share
    `ratios`, the first of its order, or goes round again, and at most `caps` (0: no limit). In each
    dataset shards are shuffled, then
    samples inside each shard, so that neighbours come from few files. Datasets are then interleaved
    evenly: each is spread over the epoch in proportion to its size, and every window sees the
    epoch's mix.
    """
    orders = []
    places = []
    first = 0
    for sizes, ratio, cap in zip(shard_sizes, ratios, caps, strict=True):
        bounds = np.cumsum([first, *sizes])
        order = [
            bounds[shard] + shuffler.permutation(sizes[shard])
            for shard in shuffler.permutation(len(sizes))
        ]
        taken = taken_of(sum(sizes), ratio=ratio, cap=cap)
        orders.append(np.resize(np.concatenate([np.zeros(0, np.int64), *order]), taken))
        places.append((np.arange(taken) + 0.5) / max(taken, 1))
        first = int(bounds[-1])
    if not orders:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]


def best_fit_decreasing(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """The pack of each document: longest first, each into the pack with the least room that takes
    it.

    No length exceeds `capacity`.
    """
    packs = np.empty(len(lengths), dtype=np.int64)
    rooms: list[tuple[int, int]] = []  # room and number of packs that are not full, ascending
    count = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        else:
            room = capacity
            pack = count
            count = count + 1
        packs[document] = pack
        if room > length:
            bisect.insort(rooms, (room - length, pack))
    return packs


def pack_windows(
    lengths: np.ndarray, *, capacity: int, window: int, shuffler: Shuffler
) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents, given in their shuffled order, window by window.

    Returns (order, packs): the documents' positions sorted by pack, in a pack by their place, and
    the pack of each. Documents of packs that stay emptier than most go on to the next window, so
    that each window need not end with packs
    half full. The packs of a window are shuffled: else each would go from long documents to short
    ones.
    """
    orders = [np.zeros(0, np.int64)]
    packs = [np.zeros(0, np.int64)]
    first_pack = 0
    waiting = np.zeros(0, dtype=np.int64)
    for start, stop in itertools.pairwise([*range(0, len(lengths), window), len(lengths)]):
        documents = np.concatenate([waiting, np.arange(start, stop)])
        pack = best_fit_decreasing(lengths[documents], capacity=capacity)
        stays = np.ones(len(documents), dtype=bool)
        if stop < len(lengths):
            stays = ~_carried(lengths[documents], pack, capacity=capacity, most=window // 2)
        waiting = documents[~stays]
        documents = documents[stays]
        pack = pack[stays]
        pack = np.unique(pack, return_inverse=True)[1]
        count = int(pack.max(initial=-1)) + 1
        pack = shuffler.permutation(count)[pack]
        order = np.argsort(pack, kind="stable")
        orders.append(documents[order])
        packs.append(first_pack + pack[order])
        first_pack += count
    return np.concatenate(orders), np.concatenate(packs)


def _carried(lengths: np.ndarray, packs: np.ndarray, *, capacity: int, most: int) -> np.ndarray:
    """Which documents go on to the next window: at most `most`, those of the emptiest packs, none
    of a pack that is fuller than WELL_FILLED, and not those of every pack.
    """
    fill = np.bincount(packs, weights=lengths) / capacity
    members = np.bincount(packs)
    emptiest = np.argsort(fill, kind="stable")
    leaves = np.zeros(len(fill), dtype=bool)
    leaves[emptiest] = (np.cumsum(members[emptiest]) <= most) & (fill[emptiest] < WELL_FILLED)
    leaves[emptiest[-1:]] = False
    return leaves[packs]


def interleave(packed: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of packs, each (documents sorted by pack, pack of each), as one over which each of them
    is spread."""
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
    """The new number of each pack, so that `size` packs that follow one another have like costs.

    Groups begin at pack `first`. Packs stay within GROUP_BLOCK groups of where they were; groups
    are shuffled within it. Packs that fill no group keep their place.
    """
    numbers = np.arange(len(costs))
    block = GROUP_BLOCK * size
    end = first + (len(costs) - first) // size * size
    for start in range(first, end, block):
        stop = min(start + block, end)
        ascending = start + np.argsort(costs[start:stop], kind="stable")
        groups = ascending.reshape(-1, size)
        numbers[groups[shuffler.permutation(len(groups))].reshape(-1)] = np.arange(start, stop)
    return numbers
