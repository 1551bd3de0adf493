"""Attention of packed documents by a variable-length kernel, with keys and values all-gathered over
CP.

With CP each chunk of a rank is a sequence of its own: a chunk's queries are the last rows of its
prefix, so causal attention aligned at the ends is exact. All chunks of a pack go through one call,
for which the keys of early chunks are laid out twice. Autograd keeps the rank's own query, key and
value, the output and its log-sum-exp; keys and values are gathered again in backward.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_vita.layout.zigzag import rank_chunks
from megatron_vita.platform.pinned import to_device


class SequenceBounds(NamedTuple):
    """Bounds of the sequences of a call; a sequence's queries are the last of its keys' rows."""

    query: Tensor  # [S + 1] int32, on the device
    key: Tensor  # [S + 1] int32, on the device
    longest_query: int
    longest_key: int


class AttentionKernel(Protocol):
    """Causal attention inside each sequence, aligned at the sequences' ends; without autograd."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: SequenceBounds
    ) -> tuple[Tensor, Tensor]:
        """Compute output [q, heads, d] and log-sum-exp [heads, q] in fp32.

        query [q, heads, d]; key, value [k, groups, d].
        """

    def backward(
        self,
        grad: Tensor,
        *,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        bounds: SequenceBounds,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the gradients of query, key and value from that of the output."""


@dataclass(frozen=True, kw_only=True)
class GatheredKeys:
    """Exchange of the keys and values that a rank's chunks attend to."""

    rows: Tensor  # [k] rows of all ranks' keys one after another, on the device
    group: ProcessGroup

    def gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Gather keys and values: this rank's [t, groups, d] -> [k, groups, d], prefix after
        prefix."""
        # Both gathers are under way before the first is waited for.
        tensors = []
        works = []
        for own in (key, value):
            whole = own.new_empty(len(own) * self.group.size(), *own.shape[1:])
            works.append(dist.all_gather_into_tensor(whole, own, group=self.group, async_op=True))
            tensors.append(whole)
        laid_out = []
        for whole, work in zip(tensors, works, strict=True):
            work.wait()
            laid_out.append(whole.index_select(0, self.rows))
        return laid_out[0], laid_out[1]

    def reduce(self, grad: Tensor) -> Tensor:
        """Reduce gradients [k, groups, d] of gathered rows to this rank's rows [t, groups, d].

        Sums over ranks and chunks are made in fp32.
        """
        ranks = self.group.size()
        total = self._gathered_length(ranks)
        # Rows of early chunks occur in several prefixes: their gradients are added up, in fp32
        # since each sum in bf16 would round.
        summed = grad.new_zeros(total, *grad.shape[1:], dtype=torch.float32)
        summed.index_add_(0, self.rows, grad.float())
        mine = summed.new_empty(total // ranks, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, summed, group=self.group)
        return mine.to(grad.dtype)

    def _gathered_length(self, ranks: int) -> int:
        """Return the rows of all ranks: a rank's prefixes hold 2 * ranks + 1 of their 2 * ranks
        chunks."""
        return len(self.rows) * 2 * ranks // (2 * ranks + 1)


@dataclass(kw_only=True)
class PackedSequences(PackedSeqParams):
    """Attention metadata of a pack: megatron-core's, for rotary positions, and the kernel's."""

    kernel: AttentionKernel
    bounds: SequenceBounds
    gathered_keys: GatheredKeys | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: query [t, heads, d]; key, value [t, groups, d] -> [t, heads, d]."""
        # A slice of the joint projection, saved for backward, would keep all of it in memory.
        out: Tensor = _Attend.apply(query, key.contiguous(), value.contiguous(), self)
        return out

    def keys_of_chunks(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values that this rank's queries see, sequence after sequence."""
        if self.gathered_keys is None:
            return key, value
        return self.gathered_keys.gather(key, value)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences
    ) -> Tensor:
        keys, values = pack.keys_of_chunks(key, value)
        out, lse = pack.kernel.forward(query, keys, values, pack.bounds)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.pack = pack
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        pack: PackedSequences = ctx.pack
        # Gathered again: kept from forward, every layer would hold keys of the whole context.
        keys, values = pack.keys_of_chunks(key, value)
        d_query, d_key, d_value = pack.kernel.backward(
            grads[0], query=query, key=keys, value=values, out=out, lse=lse, bounds=pack.bounds
        )
        if pack.gathered_keys is not None:
            d_key, d_value = (pack.gathered_keys.reduce(grad) for grad in (d_key, d_value))
        return d_query, d_key, d_value, None


class FlashAttention(nn.Module):
    """Module for megatron-core's `core_attention` slot (contract: its transformer/attention.py)."""

    def __init__(self, config: TransformerConfig, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackedSequences,
        **_: Any,
    ) -> Tensor:
        """Attend: query [t, heads, d], key and value [t, groups, d] -> [t, heads * d]."""
        return packed_seq_params.attend(query, key, value).flatten(1)


def sequences_of_rank(
    cu_seqlens: Tensor, *, group: ProcessGroup | None, device: torch.device
) -> tuple[SequenceBounds, GatheredKeys | None]:
    """Return the bounds of a rank's sequences in a pack, and with CP its exchange of keys.

    Copies to the device do not wait for it.

    Args:
        cu_seqlens: bounds of the documents [D + 1], on the host.
        group: context-parallel ranks; None for one rank.
        device: device of the results.
    """
    if group is None or group.size() == 1:
        # Kernels need not support sequences without rows.
        lengths = cu_seqlens.diff()
        lengths = lengths[lengths > 0]
        return _bounds(lengths, lengths, device), None
    chunks = rank_chunks(cu_seqlens, cp_size=group.size(), cp_rank=group.rank())
    bounds = _bounds(chunks.query_lengths, chunks.key_lengths, device)
    return bounds, GatheredKeys(rows=to_device(chunks.key_rows, device), group=group)


def _bounds(queries: Tensor, keys: Tensor, device: torch.device) -> SequenceBounds:
    query, key = (
        to_device(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(), device)
        for lengths in (queries, keys)
    )
    return SequenceBounds(query, key, int(queries.max()), int(keys.max()))
