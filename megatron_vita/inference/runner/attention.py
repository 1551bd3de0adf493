"""Attention of a step of the engine: prefill chunks over everything cached before them, or one
decode token of each of several sequences over its whole cache.

Under context parallelism keys never travel to distant queries: the queries of a step are gathered,
each rank attends to the pages that it holds, and partial results return to the queries' owners,
where they are merged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_vita.inference.runner.kv_cache import KeyValueCache
from megatron_vita.inference.runner.partial_attention import (
    attend,
    merge_all_states,
    merge_attention_states,
)
from megatron_vita.inference.runner.rotary import Rotation
from megatron_vita.layout.zigzag import positions_of_rank
from megatron_vita.parallel.collectives import exchange_rows, gather_context

Partial = tuple[Tensor, Tensor]
"""Outputs [m, heads, d] and log-sum-exps [m, heads] over a part of the keys."""


@dataclass(frozen=True, kw_only=True)
class PromptPiece:
    """Consecutive tokens of one sequence that a step computes, as they lie in the step's pack."""

    start: int  # place in the pack
    length: int  # with padding
    past: int  # how many of the cached tokens before the piece lie on this rank
    blocks: Tensor  # of the sequence, on the host


@dataclass(frozen=True)
class RowRange:
    """Rows of this rank that are consecutive in their chunk."""

    row: int  # the first of them in the slice
    offset: int  # and in the piece
    length: int


def runs_of(piece: PromptPiece, *, cp_size: int, cp_rank: int) -> list[RowRange]:
    """Rows of a chunk that a CP rank computes: pieces `cp_rank` and `2 * cp_size - 1 - cp_rank` of
    2 * CP."""
    row = piece.start // cp_size
    if cp_size == 1:
        return [RowRange(row, 0, piece.length)]
    chunk = piece.length // (2 * cp_size)
    return [
        RowRange(row, cp_rank * chunk, chunk),
        RowRange(row + chunk, (2 * cp_size - 1 - cp_rank) * chunk, chunk),
    ]


@dataclass(frozen=True, kw_only=True)
class PrefillAttention:
    """Attention of prefill rows, handed through megatron-core in the place of its PackedSeqParams."""

    cache: KeyValueCache
    pieces: list[PromptPiece]
    rotation: Rotation  # of this rank's rows
    cp_group: ProcessGroup
    held: Tensor  # [T] places of the pack that rank 0 computes, then those of rank 1, ...
    # [T] its inverse: where each place of the pack is among rows gathered over CP
    gathered_row: Tensor
    stored_rows: Tensor  # places of the pack that are stored on this rank
    slots: Tensor  # and where
    qkv_format: str = "documents"

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [t, heads, d]; key, value [t, groups, d] -> [t, heads, d]."""
        query = self.rotation.rotate(query)
        # Every rank needs the whole chunk's keys: those it stores, and those its rows attend to.
        keys = self._whole(self.rotation.rotate(key))
        values = self._whole(value)
        self.cache.write(layer, keys[self.stored_rows], values[self.stored_rows], slots=self.slots)
        own = self._attend_within(query, keys.transpose(0, 1), values.transpose(0, 1))
        if any(piece.blocks.numel() for piece in self.pieces):
            own = merge_attention_states(own, self._attend_prefix(layer, query))
        return own[0]

    def _whole(self, rows: Tensor) -> Tensor:
        """Gather the rows of all CP ranks into pack order: [t, ...] -> [T, ...]."""
        if self.cp_group.size() == 1:
            return rows
        return gather_context(rows, self.cp_group)[self.gathered_row]

    def _attend_within(self, query: Tensor, keys: Tensor, values: Tensor) -> Partial:
        """Attend from each row to the earlier rows of its own chunk: keys, values [groups, T, d]."""
        parts = []
        for piece in self.pieces:
            for run in runs_of(piece, cp_size=self.cp_group.size(), cp_rank=self.cp_group.rank()):
                rows = query[run.row : run.row + run.length]
                begin = piece.start
                middle = piece.start + run.offset
                own = slice(middle, middle + run.length)
                part = attend(rows, keys[:, own], values[:, own], causal=True)
                # Earlier rows of the chunk are all visible, without a mask.
                if run.offset:
                    part = merge_attention_states(
                        part, attend(rows, keys[:, begin:middle], values[:, begin:middle])
                    )
                parts.append(part)
        # Without CP and with one chunk there is nothing to copy.
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def _attend_prefix(self, layer: int, query: Tensor) -> Partial:
        """Attend from this rank's rows [t] to the cache before their chunks, on whatever rank it
        lies."""
        ranks = self.cp_group.size()
        # Queries travel rather than keys: a chunk is short, what is cached before it may be a
        # million tokens.
        outs, lses = self._attend_held(layer, self._whole(query))
        if ranks == 1:
            return outs, lses
        counts = [len(query)] * ranks
        received = (
            exchange_rows(
                rows[self.held], send_counts=counts, receive_counts=counts, group=self.cp_group
            )
            for rows in (outs, lses)
        )
        return merge_all_states(*(rows.unflatten(0, (ranks, -1)) for rows in received))

    def _attend_held(self, layer: int, queries: Tensor) -> Partial:
        """Attend from all rows of the pack [T, heads, d] to this rank's share of the cache before
        their chunks."""
        # The usual case, without the copy into a common buffer.
        if len(self.pieces) == 1:
            part = self._attend_piece(layer, queries, self.pieces[0])
            if part is not None:
                return part
        outs = torch.zeros_like(queries)
        # A log-sum-exp of -inf marks rows without keys here, which merging ignores.
        lses = torch.full(queries.shape[:2], -torch.inf, device=queries.device)
        for piece in self.pieces:
            part = self._attend_piece(layer, queries, piece)
            if part is not None:
                (
                    outs[piece.start : piece.start + piece.length],
                    lses[piece.start : piece.start + piece.length],
                ) = part
        return outs, lses

    def _attend_piece(self, layer: int, queries: Tensor, piece: PromptPiece) -> Partial | None:
        rows = queries[piece.start : piece.start + piece.length]
        return self.cache.attend_prefix(layer, rows, blocks=piece.blocks, length=piece.past)


@dataclass(frozen=True, kw_only=True)
class DecodeAttention:
    """Attention of one decode token of each of B sequences; all CP ranks compute the same rows."""

    cache: KeyValueCache
    rotation: Rotation
    cp_group: ProcessGroup
    tables: Tensor  # [B, blocks] int32
    lengths: Tensor  # [B] int32, tokens held here, with the new ones
    # [B] where the new tokens are stored; the scratch block where that is another rank's
    slots: Tensor
    qkv_format: str = "documents"

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, heads, d]; key, value [B, groups, d] -> [B, heads, d]."""
        query = self.cache.rotate_and_write(
            layer, query, key, value, rotation=self.rotation, slots=self.slots
        )
        out, lse = self.cache.attend_decode(layer, query, tables=self.tables, lengths=self.lengths)
        if self.cp_group.size() > 1:
            ranks = self.cp_group.size()
            # One collective for both: at one token per sequence, latency is all that counts.
            packed = gather_context(torch.cat([out, lse[..., None]], -1), self.cp_group).unflatten(
                0, (ranks, -1)
            )
            out, _ = merge_all_states(packed[..., :-1], packed[..., -1])
        return out.to(query.dtype)


def held_places(bounds: Tensor, *, cp_size: int) -> Tensor:
    """Pack positions, for bounds [D+1], in the order of rows gathered over CP: [T]."""
    return torch.cat(
        [positions_of_rank(bounds, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)]
    )
