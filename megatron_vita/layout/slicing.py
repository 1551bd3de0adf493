"""A rank's part of a pack: its tokens and labels, the way of the feature rows, and the rows that
carry loss.

All of it follows from the pack's metadata, which every rank of a replica has; nothing here
communicates.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vita.layout.dealing import deal_tiles
from megatron_vita.layout.zigzag import owners

IGNORED_LABEL = -100
ELSEWHERE = -1


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Where a rank stands in its replica, and whether TP ranks encode tiles together or each its
    own."""

    tp_size: int = 1
    tp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    vision_tensor_parallel: bool = False

    @property
    def tile_ranks(self) -> int:
        """Ranks that share the tiles of a pack: TP x CP, TP fastest; CP alone where TP ranks encode
        together."""
        if self.vision_tensor_parallel:
            return self.cp_size
        return self.tp_size * self.cp_size

    @property
    def tile_rank(self) -> int:
        """This rank among them."""
        if self.vision_tensor_parallel:
            return self.cp_rank
        return self.cp_rank * self.tp_size + self.tp_rank


@dataclass(frozen=True, kw_only=True)
class FeatureRoute:
    """How feature rows travel from the rank that encoded their tile to the rank that holds their
    placeholder."""

    send_order: Tensor  # this rank's feature rows, sorted by the rank they go to
    send_counts: list[int]  # rows to each tile rank
    receive_counts: list[int]  # rows from each tile rank
    target_rows: Tensor  # [m] row of this rank's sequence share that each received row overwrites


@dataclass(frozen=True, kw_only=True)
class PackSlice:
    """What one rank computes of a pack; t = T / CP. Sequence shares are the t / TP rows of each TP
    rank."""

    positions: Tensor  # [t] positions of the pack that this CP rank holds
    input_ids: Tensor  # [t], on the device
    labels: Tensor  # [t] on the host, -100 where there is no loss
    cu_seqlens: Tensor  # [D+1] bounds of the documents in the whole pack
    route: FeatureRoute

    def to(self, device: torch.device) -> "PackSlice":
        """The same with its input ids on `device`; what only decides shapes and routes stays on the
        host."""
        return replace(self, input_ids=self.input_ids.to(device))

    @property
    def loss_rows(self) -> Tensor:
        """Rows of the slice that predict a scored token: [L]."""
        return (self.labels != IGNORED_LABEL).nonzero().squeeze(1)


def slice_pack(
    input_ids: Tensor,
    *,
    labels: Tensor,
    cu_seqlens: Tensor,
    placements: Tensor,
    frames: Tensor,
    rows_per_tile: int,
    layout: RankLayout,
) -> PackSlice:
    """The part of a pack that the rank at `layout` computes.

    `input_ids`, `labels` [T]; `cu_seqlens` [D+1]; `placements` [N] position of each tile's first
    placeholder; `frames` [N] bool, whether it is of a video.
    """
    owner = owners(cu_seqlens, layout.cp_size)
    positions = (owner == layout.cp_rank).nonzero().squeeze(1)
    hands = deal_tiles(frames, layout.tile_ranks)
    return PackSlice(
        positions=positions,
        input_ids=input_ids[positions],
        labels=labels[positions],
        cu_seqlens=cu_seqlens,
        route=route_features(
            owner, placements=placements, hands=hands, rows_per_tile=rows_per_tile, layout=layout
        ),
    )


def route_features(
    owner: Tensor,
    *,
    placements: Tensor,
    hands: list[Tensor],
    rows_per_tile: int,
    layout: RankLayout,
) -> FeatureRoute:
    """The way of every feature row of a pack, seen from the rank at `layout`.

    `hands` are the tiles of each tile rank, ascending. Rows arrive ordered by source rank and,
    within one, by tile. Where TP ranks encode together, each has all rows of its tiles and sends
    those for its own sequence share and for those of equal TP rank.
    """
    destination, share_row = _holders(owner, layout)
    position = placements[:, None] + torch.arange(rows_per_tile)  # [N, rows_per_tile]
    destination = destination[position]
    share_row = share_row[position]
    mine = destination[hands[layout.tile_rank]].flatten()
    order = torch.argsort(mine, stable=True)
    arriving = [share_row[hand][destination[hand] == layout.tile_rank] for hand in hands]
    return FeatureRoute(
        send_order=order[mine[order] != ELSEWHERE],
        send_counts=torch.bincount(mine[mine != ELSEWHERE], minlength=layout.tile_ranks).tolist(),
        receive_counts=list(map(len, arriving)),
        target_rows=torch.cat(arriving),
    )


def _holders(owner: Tensor, layout: RankLayout) -> tuple[Tensor, Tensor]:
    """For each position of the pack: the tile rank whose sequence share holds it, and its row in
    that share.

    Where TP ranks encode together, ELSEWHERE stands for shares of another TP rank.
    """
    share = len(owner) // (layout.tp_size * layout.cp_size)
    row = torch.empty_like(owner)
    for cp_rank in range(layout.cp_size):
        held = owner == cp_rank
        row[held] = torch.arange(int(held.sum()))
    tp_rank = row // share
    if layout.vision_tensor_parallel:
        return owner.where(tp_rank == layout.tp_rank, ELSEWHERE), row % share
    return owner * layout.tp_size + tp_rank, row % share
