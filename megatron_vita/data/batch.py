"""`Batch`: one pack as tensors, what `data` hands to `training`."""

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

    A document is padded at its end with ordinary pad tokens without loss. Room left at the end of
    the pack is one last document of pad tokens, so that `cu_seqlens[-1]` is T always. Where
    documents see earlier ones, nothing but the end of the pack is padded, and `cu_seqlens` is one
    segment.
    """

    pack_id: int
    input_ids: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, shifted inside each document, -100 = no loss
    loss_weights: torch.Tensor | None = None  # [T] fp32 factors on the losses; None where all are 1
    document_starts: torch.Tensor  # [D+1] int32: bounds for labels and metrics
    cu_seqlens: torch.Tensor  # [D+1] or [2] int32: bounds for attention and rotary positions
    document_sources: torch.Tensor  # [D] int64: dataset in the recipe's list; -1 for the tail
    tiles: torch.Tensor  # [n,3,S,S] uint8: this rank's
    tile_ids: torch.Tensor  # [n] int64: which of the pack's they are, ascending
    # [N] int64: position of the first placeholder of each tile of the pack
    placements: torch.Tensor
    frames: torch.Tensor  # [N] bool: whether it is of a video
    num_tokens: int  # padding not counted
    sample_keys: list[str]
    masked: list[int] = field(default_factory=list)  # documents that could not be read
    # frames that stand for damaged ones, by document
    stand_ins: dict[int, int] = field(default_factory=dict)


def mark_frames(documents: Sequence[Document]) -> torch.Tensor:
    """Whether each tile of a pack is of a video: [N] bool."""
    media = [medium for document in documents for medium in document.media]
    counts = torch.tensor([medium.num_tiles for medium in media], dtype=torch.int64)
    return torch.tensor(
        [medium.grid is None for medium in media], dtype=torch.bool
    ).repeat_interleave(counts)


def mask_documents(
    batch: Batch, documents: Sequence[int], *, pad_id: int, rows_per_tile: int
) -> Batch:
    """The batch with some documents blank: pad tokens without loss, black tiles. The same on all
    ranks of a replica, whatever each has read of them.
    """
    input_ids = batch.input_ids.clone()
    labels = batch.labels.clone()
    placements = batch.placements.clone()
    tiles = batch.tiles
    for document in documents:
        start, stop = batch.document_starts[document : document + 2].tolist()
        input_ids[start:stop] = pad_id
        labels[start:stop] = IGNORED_LABEL
        first, last = torch.searchsorted(batch.placements, torch.tensor([start, stop])).tolist()
        placements[first:last] = start + torch.from_numpy(
            blank_placements(last - first, rows_per_tile)
        )
        tiles[(batch.tile_ids >= first) & (batch.tile_ids < last)] = 0
    return replace(
        batch, input_ids=input_ids, labels=labels, placements=placements, masked=sorted(documents)
    )


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
    """Lays documents one after another in a pack of `data.seq_length` tokens. They must fit: the
    plan saw to it."""
    seq_length = data.seq_length
    input_ids = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, IGNORED_LABEL, dtype=np.int64)
    starts = np.cumsum(
        [0, *(round_up(len(document), data.padding_multiple) for document in documents)]
    )
    assert starts[-1] <= seq_length, (
        f"pack {pack_id}: {starts[-1]} tokens in a pack of {seq_length}"
    )
    weights = np.ones(seq_length, dtype=np.float32)
    for start, document in zip(starts, documents, strict=False):
        here = slice(start, start + len(document))
        input_ids[here] = document.input_ids
        labels[here] = document.labels
        weights[here] = document.weight
    placements = [
        start + document.placements for start, document in zip(starts, documents, strict=False)
    ]
    all_sources = list(sources)
    if starts[-1] < seq_length:
        starts = np.append(starts, seq_length)
        all_sources.append(TAIL_SOURCE)
    bounds = torch.tensor(starts, dtype=torch.int32)
    return Batch(
        pack_id=pack_id,
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(weights)
        if any(document.weight != 1 for document in documents)
        else None,
        document_starts=bounds,
        cu_seqlens=bounds
        if data.isolate_documents
        else torch.tensor([0, seq_length], dtype=torch.int32),
        document_sources=torch.tensor(all_sources, dtype=torch.int64),
        tiles=tiles,
        tile_ids=tile_ids,
        placements=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *placements])),
        frames=mark_frames(documents),
        num_tokens=sum(map(len, documents)),
        sample_keys=[document.key for document in documents],
    )
