"""In which order samples come and which share a pack: pure functions of sizes and a seed.

Random numbers are raw 64-bit words of PCG64, whose stream numpy keeps the same in every version; orders are stable
sorts by them. So a plan does not depend on the numpy that made it.
"""

import itertools
from collections.abc import Sequence

import numpy as np


class Shuffler:
    """Permutations from a seed; the identity if the seed is None."""

    def __init__(self, seed: Sequence[int] | None) -> None:
        self._bits = None if seed is None else np.random.PCG64(np.random.SeedSequence(list(seed)))

    def permutation(self, length: int) -> np.ndarray:
        """A permutation of range(length)."""
        if self._bits is None:
            return np.arange(length)
        return np.argsort(self._bits.random_raw(length), kind="stable")


def sample_order(shard_sizes: list[list[int]], *, ratios: Sequence[float], shuffler: Shuffler) -> np.ndarray:
    """An epoch's order of samples, as positions in the datasets' shards laid end to end.

    `shard_sizes` holds the samples of each shard of each dataset, of which an epoch takes the share `ratios`, the first
    of its order, or goes round again. In each dataset shards are shuffled, then samples
    inside each shard, so that neighbours come from few files. Datasets are then interleaved evenly: each is spread over
    the epoch in proportion to its size, and every window sees the epoch's mix.
    """
    orders, places = [], []
    first = 0
    for sizes, ratio in zip(shard_sizes, ratios, strict=True):
        bounds = np.cumsum([first, *sizes])
        order = [bounds[shard] + shuffler.permutation(sizes[shard]) for shard in shuffler.permutation(len(sizes))]
        taken = int(sum(sizes) * ratio)
        orders.append(np.resize(np.concatenate([np.zeros(0, np.int64), *order]), taken))
        places.append((np.arange(taken) + 0.5) / max(taken, 1))
        first = int(bounds[-1])
    if not orders:
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(orders)[np.argsort(np.concatenate(places), kind="stable")]


def first_fit_decreasing(lengths: np.ndarray, *, capacity: int) -> np.ndarray:
    """The pack of each document: longest first, each into the first pack with room. No length exceeds `capacity`."""
    packs = np.empty(len(lengths), dtype=np.int64)
    room = np.full(len(lengths), capacity, dtype=np.int64)
    for document in np.argsort(-lengths, kind="stable"):
        pack = int(np.argmax(room >= lengths[document]))
        packs[document] = pack
        room[pack] -= lengths[document]
    return packs


def pack_windows(
    lengths: np.ndarray, *, capacity: int, window: int, shuffler: Shuffler
) -> tuple[np.ndarray, np.ndarray]:
    """Packs documents, given in their shuffled order, window by window.

    Returns (order, packs): the documents' positions sorted by pack, in a pack by their place in the window, and the
    pack of each. The packs of a window are shuffled: else each window would go from long documents to short ones.
    """
    orders, packs, first_pack = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for start, stop in itertools.pairwise([*range(0, len(lengths), window), len(lengths)]):
        pack = first_fit_decreasing(lengths[start:stop], capacity=capacity)
        count = int(pack.max()) + 1
        pack = shuffler.permutation(count)[pack]
        order = np.argsort(pack, kind="stable")
        orders.append(start + order)
        packs.append(first_pack + pack[order])
        first_pack += count
    return np.concatenate(orders), np.concatenate(packs)
