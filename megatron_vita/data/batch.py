"""`Batch`: one pack as tensors, the interface between `data` and `training`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from megatron_vita.config import DataConfig
from megatron_vita.data.samples.documents import Document, blank_placements
from megatron_vita.layout.slicing import IGNORED_LABEL
from megatron_vita.rounding import round_up

TAIL_SOURCE = -1


@dataclass(kw_only=True)
class Batch:
    """One pack of T tokens, D documents and N tiles, of which this rank holds n.

    A document is padded at its end with pad tokens without loss. The rest of the pack is one more
    document of pad tokens, so that `cu_seqlens[-1]` is always T. If documents attend to earlier
    ones, only the end of the pack is padded, and `cu_seqlens` has one segment.
    """

    pack_id: int
    input_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, shifted inside each document, -100 = no loss
    loss_weights: torch.Tensor | None = None  # [T] fp32 factors on the losses; None where all are 1
    document_starts: torch.Tensor  # [D+1] int32: bounds for labels and metrics
    cu_seqlens: torch.Tensor  # [D+1] or [2] int32: bounds for attention and rotary positions
    document_sources: torch.Tensor  # [D] int64: dataset in the recipe's list; -1 for the tail
    tiles: torch.Tensor  # [n,3,S,S] uint8: this rank's
    tile_ids: torch.Tensor  # [n] int64: their indices in the pack, ascending
    # [N] int64: position of the first placeholder of each tile of the pack
    placements: torch.Tensor
    frames: torch.Tensor  # [N] bool: true for frames of videos
    # [documents without the tail] int64: position of the rejected conversation of a pair, -1 for
    # other documents; None where there is no pair
    rejected_starts: torch.Tensor | None = None
    num_tokens: int  # without padding
    sample_keys: list[str]
    masked: list[int] = field(default_factory=list)  # documents that could not be read
    # number of frames that replace damaged ones, by document
    stand_ins: dict[int, int] = field(default_factory=dict)

    @property
    def conversation_lengths(self) -> list[int]:
        """Padded lengths of documents, and of both conversations of pairs; without the tail."""
        bounds = self.document_starts[: int((self.document_sources != TAIL_SOURCE).sum()) + 1]
        if self.rejected_starts is not None:
            bounds = _with_rejected(bounds, self.rejected_starts)
        return bounds.diff().tolist()


def _with_rejected(bounds: torch.Tensor, rejected_starts: torch.Tensor) -> torch.Tensor:
    """Add the beginnings of rejected conversations to bounds of documents."""
    inside = rejected_starts[rejected_starts >= 0]
    return torch.cat([bounds, inside.to(bounds.dtype)]).sort().values


def mark_frames(documents: Sequence[Document]) -> torch.Tensor:
    """Mark the tiles of a pack that are frames of videos: bool [N]."""
    media = [medium for document in documents for medium in document.media]
    counts = torch.tensor([medium.num_tiles for medium in media], dtype=torch.int64)
    # Only images have a grid.
    is_video = torch.tensor([medium.grid is None for medium in media], dtype=torch.bool)
    return is_video.repeat_interleave(counts)


def mask_documents(
    batch: Batch, documents: Sequence[int], *, pad_id: int, rows_per_tile: int
) -> Batch:
    """Blank some documents: pad tokens without loss, black tiles.

    The result is the same on all ranks of a replica, whatever each has read of these documents.

    Args:
        batch: the pack; its tiles are changed in place.
        documents: indices of the documents to blank.
        pad_id: id of the pad token.
        rows_per_tile: placeholder tokens of a tile.
    """
    input_ids = batch.input_ids.clone()
    labels = batch.labels.clone()
    placements = batch.placements.clone()
    tiles = batch.tiles
    for document in documents:
        start, stop = batch.document_starts[document : document + 2].tolist()
        input_ids[start:stop] = pad_id
        labels[start:stop] = IGNORED_LABEL
        # The placements of a document's tiles lie within its bounds, and ascend over the pack.
        first, last = torch.searchsorted(batch.placements, torch.tensor([start, stop])).tolist()
        placements[first:last] = start + torch.from_numpy(
            blank_placements(last - first, rows_per_tile)
        )
        # In place, since the tiles of a long pack are gigabytes.
        tiles[(batch.tile_ids >= first) & (batch.tile_ids < last)] = 0
    return replace(
        batch, input_ids=input_ids, labels=labels, placements=placements, masked=sorted(documents)
    )


def _tokens(
    documents: Sequence[Document], *, starts: np.ndarray, seq_length: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [T] and labels [T] of a pack, padded between documents and after the last."""
    input_ids = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, IGNORED_LABEL, dtype=np.int64)
    for start, document in zip(starts, documents, strict=False):
        here = slice(start, start + len(document))
        input_ids[here] = document.input_ids
        labels[here] = document.labels
    return torch.from_numpy(input_ids), torch.from_numpy(labels)


def _loss_weights(
    documents: Sequence[Document], *, starts: np.ndarray, seq_length: int
) -> torch.Tensor | None:
    """Factor on the loss of each position [T]; None if all are 1."""
    if all(document.weight == 1 for document in documents):
        return None
    weights = np.ones(seq_length, dtype=np.float32)
    for start, document in zip(starts, documents, strict=False):
        weights[start : start + len(document)] = document.weight
    return torch.from_numpy(weights)


def _rejected_starts(documents: Sequence[Document], *, starts: np.ndarray) -> torch.Tensor | None:
    """Positions of the rejected conversations of pairs, -1 for other documents; None without a
    pair."""
    if not any(document.rejected_start for document in documents):
        return None
    found = [
        int(start) + document.rejected_start if document.rejected_start else -1
        for start, document in zip(starts, documents, strict=False)
    ]
    return torch.tensor(found, dtype=torch.int64)


def collate(
    documents: Sequence[Document],
    *,
    pack_id: int,
    sources: Sequence[int],
    data: DataConfig,
    pad_id: int,
    tiles: torch.Tensor,
    tile_ids: torch.Tensor,
) -> Batch:
    """Lay out documents one after another in a pack of `data.seq_length` tokens.

    Args:
        documents: documents of the pack, which fit by the plan.
        pack_id: number of the pack in the plan.
        sources: dataset of each document.
        data: the recipe's `data`.
        pad_id: id of the pad token.
        tiles: tiles of this rank, uint8 [n, 3, S, S].
        tile_ids: indices of these among the tiles of the pack [n], ascending.
    """
    seq_length = data.seq_length
    lengths = [round_up(len(document), data.padding_multiple) for document in documents]
    starts = np.cumsum([0, *lengths])
    assert starts[-1] <= seq_length, f"pack {pack_id}: {starts[-1]} of {seq_length} tokens"
    input_ids, labels = _tokens(documents, starts=starts, seq_length=seq_length, pad_id=pad_id)
    loss_weights = _loss_weights(documents, starts=starts, seq_length=seq_length)
    placements = [
        start + document.placements for start, document in zip(starts, documents, strict=False)
    ]
    all_sources = list(sources)
    if starts[-1] < seq_length:
        # The tail is a document of its own, so that attention kernels get bounds up to T.
        starts = np.append(starts, seq_length)
        all_sources.append(TAIL_SOURCE)
    bounds = torch.tensor(starts, dtype=torch.int32)
    rejected_starts = _rejected_starts(documents, starts=starts)
    cu_seqlens = bounds
    if rejected_starts is not None:
        cu_seqlens = _with_rejected(bounds, rejected_starts)
    if not data.isolate_documents:
        cu_seqlens = torch.tensor([0, seq_length], dtype=torch.int32)
    return Batch(
        pack_id=pack_id,
        input_ids=input_ids,
        labels=labels,
        loss_weights=loss_weights,
        document_starts=bounds,
        cu_seqlens=cu_seqlens,
        document_sources=torch.tensor(all_sources, dtype=torch.int64),
        tiles=tiles,
        tile_ids=tile_ids,
        placements=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *placements])),
        frames=mark_frames(documents),
        rejected_starts=rejected_starts,
        num_tokens=sum(map(len, documents)),
        sample_keys=[document.key for document in documents],
    )
