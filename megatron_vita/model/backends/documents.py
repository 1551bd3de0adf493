"""Attention metadata of the `torch` backend: the documents of a pack, grouped by length.

Documents of one length are attended to in one batched call; since lengths are multiples of the
document alignment, there are few groups.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vita.layout.zigzag import gathered_rows, offsets_in_document, positions_of_rank
from megatron_vita.parallel.collectives import gather_context
from megatron_vita.platform.pinned import to_device


@dataclass(frozen=True, kw_only=True)
class DocumentGroup:
    """`count` documents of equal length: queries of this rank's rows, keys of all rows."""

    count: int
    length: int
    # [q rows of one document, length]; None for plain causal attention, without CP
    mask: Tensor | None

    @property
    def query_rows(self) -> int:
        """Number of this rank's rows in the group."""
        if self.mask is None:
            return self.count * self.length
        return self.count * len(self.mask)

    def to(self, device: torch.device) -> "DocumentGroup":
        """Return a copy with its mask on `device`."""
        if self.mask is None:
            return self
        return replace(self, mask=to_device(self.mask, device))

    def attend(self, query: Tensor, *, key: Tensor, value: Tensor) -> Tensor:
        """Attend in all documents of the group at once; rows of a document are consecutive."""
        q, k, v = (x.unflatten(0, (self.count, -1)).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.mask is None
        )
        return out.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class PackedDocuments:
    """Attention metadata that megatron-core passes on in the place of its PackedSeqParams.

    Any `qkv_format` but "thd" leaves rotary positions to the caller.
    """

    query_order: Tensor  # [t] local rows, group by group, document by document
    key_order: Tensor  # [T] rows of the keys gathered over CP, in the same order
    groups: list[DocumentGroup]
    cp_group: ProcessGroup | None
    qkv_format: str = "documents"

    def to(self, device: torch.device) -> "PackedDocuments":
        """Return a copy with its tensors on `device`."""
        return replace(
            self,
            query_order=to_device(self.query_order, device),
            key_order=to_device(self.key_order, device),
            groups=[group.to(device) for group in self.groups],
        )

    def attend(self, _layer_number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally inside each document.

        query [t, heads, d]; key, value [t, groups, d] -> [t, heads, d].
        """
        # This rank's queries may see keys of any rank, since every rank holds a chunk of the
        # beginning and one of the end of each document.
        if self.cp_group is not None:
            key, value = (gather_context(x, self.cp_group) for x in (key, value))
        repeats = query.shape[1] // key.shape[1]
        query = query[self.query_order]
        key, value = (x[self.key_order].repeat_interleave(repeats, dim=1) for x in (key, value))
        results = []
        q_row = 0
        k_row = 0
        for group in self.groups:
            q_next = q_row + group.query_rows
            k_next = k_row + group.count * group.length
            results.append(
                group.attend(query[q_row:q_next], key=key[k_row:k_next], value=value[k_row:k_next])
            )
            q_row = q_next
            k_row = k_next
        ordered = torch.cat(results)
        return torch.empty_like(ordered).index_copy(0, self.query_order, ordered)


def pack_documents(
    cu_seqlens: Tensor, *, cp_size: int = 1, cp_rank: int = 0, cp_group: ProcessGroup | None = None
) -> tuple[PackedDocuments, Tensor]:
    """Group the documents of a pack, and return the rotary positions [t] of this rank's rows.

    Empty documents are left out.

    Args:
        cu_seqlens: bounds of the documents [D+1], on the host.
        cp_size: context-parallel ranks.
        cp_rank: this rank among them.
        cp_group: their group; None for one rank.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    held = positions_of_rank(cu_seqlens, cp_size=cp_size, cp_rank=cp_rank)
    gathered_row = gathered_rows(cu_seqlens, cp_size=cp_size)
    local_row = torch.full_like(
        gathered_row, -1
    )  # pack position -> row of this rank; -1: another's
    local_row[held] = torch.arange(len(held))
    groups = []
    query_order = []
    key_order = []
    for length in lengths.unique().tolist():
        if length == 0:
            continue
        starts = cu_seqlens[:-1][lengths == length].to(torch.int64)
        positions = (starts[:, None] + torch.arange(length)).flatten()
        rows = local_row[positions]
        # Documents of one length are cut alike, so that the first one's mask serves for all.
        # Without CP torch's own causal attention needs no mask, and has faster kernels.
        mask = None
        if cp_size > 1:
            mask = _mask(rows[:length] >= 0)
        groups.append(DocumentGroup(count=len(starts), length=length, mask=mask))
        query_order.append(rows[rows >= 0])
        key_order.append(gathered_row[positions])
    documents = PackedDocuments(
        query_order=torch.cat(query_order),
        key_order=torch.cat(key_order),
        groups=groups,
        cp_group=cp_group,
    )
    return documents, offsets_in_document(cu_seqlens)[held]


def _mask(held: Tensor) -> Tensor:
    """Build the causal mask [held offsets, offsets] of a document, of which this rank holds
    `held`."""
    return held.nonzero() >= torch.arange(len(held))
