"""Slice of a pack that one rank computes: its tokens and labels, the route of feature rows, the
rows that carry loss.

Every rank of a replica derives it from the same metadata of the pack; nothing here communicates.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.layout.zigzag import owners

IGNORED_LABEL = -100
"""Label of a position without loss, as in PyTorch's `ignore_index`."""
ELSEWHERE = -1
"""Destination of feature rows that another TP rank sends."""


@dataclass(frozen=True, kw_only=True)
class RankLayout:
    """Coordinates of a rank in its replica.

    With `vision_tensor_parallel` the TP ranks encode the same tiles together.
    """

    tp_size: int = 1
    tp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    vision_tensor_parallel: bool = False

    @property
    def tile_ranks(self) -> int:
        """Ranks that share a pack's tiles: TP x CP, TP fastest; CP alone with a TP-split tower."""
        if self.vision_tensor_parallel:
            return self.cp_size
        return self.tp_size * self.cp_size

    @property
    def tile_rank(self) -> int:
        """Index of this rank among the `tile_ranks`."""
        if self.vision_tensor_parallel:
            return self.cp_rank
        return self.cp_rank * self.tp_size + self.tp_rank


@dataclass(frozen=True, kw_only=True)
class FeatureRoute:
    """Route of feature rows from the rank that encoded a tile to the rank that holds its
    placeholders."""

    send_order: Tensor  # this rank's feature rows, sorted by the rank they go to
    send_counts: list[int]  # rows to each tile rank
    receive_counts: list[int]  # rows from each tile rank
    target_rows: Tensor  # [m] row of this rank's sequence slice that each received row overwrites


@dataclass(frozen=True, kw_only=True)
class PackSlice:
    """One rank's slice of a pack; t = T / CP tokens, of which each TP rank embeds t / TP."""

    positions: Tensor  # [t] positions of the pack that this CP rank holds
    input_ids: Tensor  # [t], on the device
    labels: Tensor  # [t] on the host, -100 where there is no loss
    cu_seqlens: Tensor  # [D+1] bounds of the documents in the whole pack
    route: FeatureRoute

    def to(self, device: torch.device) -> "PackSlice":
        """Return the slice with its input ids on `device`."""
        # The rest decides shapes and routes: on a device, reading it would synchronize the stream.
        return replace(self, input_ids=self.input_ids.to(device))

    @property
    def loss_rows(self) -> Tensor:
        """Indices of the rows that predict a token with loss: [L]."""
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
    """Slice a pack for the rank at `layout`.

    Args:
        input_ids: [T].
        labels: [T], already shifted inside each document.
        cu_seqlens: bounds of the documents [D+1].
        placements: position of each tile's first placeholder [N].
        frames: bool [N], true for tiles that are frames of videos.
        rows_per_tile: feature rows of a tile, which are consecutive placeholders.
        layout: coordinates of the rank.
    """
    owner = owners(cu_seqlens, layout.cp_size)
    positions = (owner == layout.cp_rank).nonzero().squeeze(1)
    assignments = assign_tiles(frames, layout.tile_ranks)
    return PackSlice(
        positions=positions,
        input_ids=input_ids[positions],
        labels=labels[positions],
        cu_seqlens=cu_seqlens,
        route=route_features(
            owner,
            placements=placements,
            assignments=assignments,
            rows_per_tile=rows_per_tile,
            layout=layout,
        ),
    )


def route_features(
    owner: Tensor,
    *,
    placements: Tensor,
    assignments: list[Tensor],
    rows_per_tile: int,
    layout: RankLayout,
) -> FeatureRoute:
    """Route the feature rows of a pack, seen from the rank at `layout`.

    Rows arrive ordered by source rank and, within one, by tile. With a TP-split tower each TP rank
    has all rows of the group's tiles and sends those for sequence slices of its own TP rank.

    Args:
        owner: CP rank of each position [T], as of `zigzag.owners`.
        placements: position of each tile's first placeholder [N].
        assignments: indices of the tiles of each tile rank, ascending.
        rows_per_tile: feature rows of a tile.
        layout: coordinates of the rank.
    """
    # By position of the pack first, then for each row of each tile.
    destination, slice_row = _holders(owner, layout)
    position = placements[:, None] + torch.arange(rows_per_tile)  # [N, rows_per_tile]
    destination = destination[position]
    slice_row = slice_row[position]
    mine = destination[assignments[layout.tile_rank]].flatten()
    # Stable: rows to one rank stay in tile order, which the receiver counts on in `target_rows`.
    order = torch.argsort(mine, stable=True)
    arriving = [
        slice_row[assigned][destination[assigned] == layout.tile_rank] for assigned in assignments
    ]
    return FeatureRoute(
        send_order=order[mine[order] != ELSEWHERE],
        send_counts=torch.bincount(mine[mine != ELSEWHERE], minlength=layout.tile_ranks).tolist(),
        receive_counts=list(map(len, arriving)),
        target_rows=torch.cat(arriving),
    )


def _holders(owner: Tensor, layout: RankLayout) -> tuple[Tensor, Tensor]:
    """Tile rank whose sequence slice holds each position of the pack [T], and its row there [T].

    With a TP-split tower, the rank is ELSEWHERE for slices of another TP rank.
    """
    size = len(owner) // (layout.tp_size * layout.cp_size)
    row = torch.empty_like(owner)
    for cp_rank in range(layout.cp_size):
        held = owner == cp_rank
        row[held] = torch.arange(int(held.sum()))
    # The slice of a CP rank is cut into equal consecutive parts, one for each of its TP ranks.
    tp_rank = row // size
    if layout.vision_tensor_parallel:
        return owner.where(tp_rank == layout.tp_rank, ELSEWHERE), row % size
    return owner * layout.tp_size + tp_rank, row % size
