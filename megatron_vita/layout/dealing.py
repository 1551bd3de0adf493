"""Who works on what: the tiles of a pack that each rank encodes, the packs of a step that each
replica takes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def deal_tiles(frames: Tensor, ranks: int) -> list[Tensor]:
    """The tiles of a pack that each of `ranks` ranks decodes and encodes, ascending: `frames` [N]
    bool marks those that are frames of videos, the others are of images.

    Each rank has a contiguous run of the image tiles and one of the frames, since a frame costs
    many times the decoding of an image's tile. Numbers of image tiles differ by at most one, and so
    do numbers of all tiles. Contiguity keeps
    media whole where possible: at most `ranks - 1` images and `ranks - 1` videos of a pack are
    opened by two ranks.
    """
    of_images = (~frames).nonzero().squeeze(1)
    of_videos = frames.nonzero().squeeze(1)
    images = _split(len(of_images), [len(of_images) // ranks] * ranks, order=range(ranks))
    fewest_first = sorted(range(ranks), key=lambda rank: images[rank])
    videos = _split(len(of_videos), [len(of_videos) // ranks] * ranks, order=fewest_first)
    runs = zip(of_images.split(images), of_videos.split(videos), strict=True)
    return [torch.cat(run).sort().values for run in runs]


def _split(total: int, shares: list[int], *, order: Sequence[int]) -> list[int]:
    """The shares, with what they lack of `total` given one by one in `order`."""
    for rank in order[: total - sum(shares)]:
        shares[rank] += 1
    return shares


def deal_packs(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The packs of a step for each of `ranks` replicas: equally many, in ascending order, of nearly
    equal cost.

    The dearest pack goes first, each to the replica with the least cost that has room; then packs
    are exchanged with the dearest replica as long as that makes it cheaper. `len(costs)` must be a
    multiple of `ranks`.
    """
    room = len(costs) // ranks
    assert room * ranks == len(costs), f"{len(costs)} packs over {ranks} replicas"
    cost = np.asarray(costs, dtype=np.float64)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    sums = np.zeros(ranks)
    for pack in np.argsort(-cost, kind="stable").tolist():
        rank = int(np.argmin(np.where([len(hand) < room for hand in hands], sums, np.inf)))
        hands[rank].append(pack)
        sums[rank] += cost[pack]
    for _ in range(len(costs)):
        if not _lower_the_dearest(hands, sums, cost):
            break
    return [sorted(hand) for hand in hands]


def _lower_the_dearest(hands: list[list[int]], sums: np.ndarray, cost: np.ndarray) -> bool:
    """Exchanges one pack of the dearest replica so that the dearer of the two becomes as cheap as
    can be."""
    dearest = int(np.argmax(sums))
    best = sums[dearest] * (1 - 1e-9)
    exchange = None
    for other in range(len(hands)):
        if other == dearest:
            continue
        gain = cost[hands[dearest]][:, None] - cost[hands[other]][None, :]
        result = np.maximum(sums[dearest] - gain, sums[other] + gain)
        mine, theirs = divmod(int(np.argmin(result)), result.shape[1])
        if result[mine, theirs] < best:
            best = result[mine, theirs]
            exchange = (other, mine, theirs)
    if exchange is None:
        return False
    other, mine, theirs = exchange
    given = hands[dearest][mine]
    taken = hands[other][theirs]
    hands[dearest][mine] = taken
    hands[other][theirs] = given
    sums[dearest] += cost[taken] - cost[given]
    sums[other] += cost[given] - cost[taken]
    return True
