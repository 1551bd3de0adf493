"""Assignment of work to ranks: a pack's tiles to the ranks that encode them, a step's packs to
replicas."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def assign_tiles(frames: Tensor, ranks: int) -> list[Tensor]:
    """Assign the tiles of a pack to the ranks that decode and encode them.

    Each rank has a contiguous run of the image tiles and one of the frames. Numbers of image tiles
    differ by at most one between ranks, and so do numbers of all tiles.

    Args:
        frames: bool [N], true for tiles that are frames of videos; the others are of images.
        ranks: number of ranks that share the tiles.

    Returns:
        Indices of each rank's tiles, ascending.
    """
    # Frames are split apart from image tiles, since decoding one costs many times as much. Runs are
    # contiguous to keep media whole: at most `ranks - 1` images and `ranks - 1` videos of a pack
    # are opened by two ranks.
    of_images = (~frames).nonzero().squeeze(1)
    of_videos = frames.nonzero().squeeze(1)
    images = _split(len(of_images), ranks, order=range(ranks))
    # Ranks with fewer image tiles take the remaining frames, so that the totals stay even too.
    fewest_first = sorted(range(ranks), key=lambda rank: images[rank])
    videos = _split(len(of_videos), ranks, order=fewest_first)
    runs = zip(of_images.split(images), of_videos.split(videos), strict=True)
    return [torch.cat(run).sort().values for run in runs]


def _split(total: int, ranks: int, *, order: Sequence[int]) -> list[int]:
    """Split `total` evenly over ranks; the remainder goes to the first ranks of `order`."""
    counts = [total // ranks] * ranks
    for rank in order[: total % ranks]:
        counts[rank] += 1
    return counts


def assign_packs(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign the packs of a step to data-parallel replicas at nearly equal cost.

    Args:
        costs: cost of each pack; their number must be a multiple of `ranks`.
        ranks: number of replicas.

    Returns:
        Indices of each replica's packs, ascending; equally many for each replica.
    """
    room = len(costs) // ranks
    assert room * ranks == len(costs), f"{len(costs)} packs over {ranks} replicas"
    cost = np.asarray(costs, dtype=np.float64)
    assignments: list[list[int]] = [[] for _ in range(ranks)]
    sums = np.zeros(ranks)
    # Greedy start: the costliest pack first, each to the cheapest replica that has room.
    for pack in np.argsort(-cost, kind="stable").tolist():
        has_room = [len(assigned) < room for assigned in assignments]
        rank = int(np.argmin(np.where(has_room, sums, np.inf)))
        assignments[rank].append(pack)
        sums[rank] += cost[pack]
    # Then swaps as long as they help. The bound on their number is a guard against cycles that
    # rounding could cause; a handful is enough in practice.
    for _ in range(len(costs)):
        if not _lower_maximum(assignments, sums, cost):
            break
    return [sorted(assigned) for assigned in assignments]


def _lower_maximum(assignments: list[list[int]], sums: np.ndarray, cost: np.ndarray) -> bool:
    """Swap one pack of the costliest replica for one of another if that lowers the greater of both.

    Takes the best such swap, updates `assignments` and `sums`, and returns whether there was one.
    """
    costliest = int(np.argmax(sums))
    # The margin refuses swaps whose gain is rounding error: they could be undone again for ever.
    best = sums[costliest] * (1 - 1e-9)
    swap = None
    for other in range(len(assignments)):
        if other == costliest:
            continue
        gain = cost[assignments[costliest]][:, None] - cost[assignments[other]][None, :]
        result = np.maximum(sums[costliest] - gain, sums[other] + gain)
        mine, theirs = divmod(int(np.argmin(result)), result.shape[1])
        if result[mine, theirs] < best:
            best = result[mine, theirs]
            swap = (other, mine, theirs)
    if swap is None:
        return False
    other, mine, theirs = swap
    given = assignments[costliest][mine]
    taken = assignments[other][theirs]
    assignments[costliest][mine] = taken
    assignments[other][theirs] = given
    sums[costliest] += cost[taken] - cost[given]
    sums[other] += cost[given] - cost[taken]
    return True
