"""Which tiles of a pack each rank of a replica decodes and encodes."""

import itertools


def deal(num_tiles: int, ranks: int) -> list[range]:
    """Contiguous runs of tiles, one for each of `ranks` ranks, whose lengths differ by at most one.

    Contiguity keeps an image or video whole where possible: at most `ranks - 1` of a pack are opened by two ranks.
    """
    bounds = [num_tiles * rank // ranks for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
