"""Key-value cache of one rank: pages of its heads for each layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.inference.runner.partial_attention import attend, merge_attention_states
from megatron_vita.inference.runner.rotary import Rotation
from megatron_vita.layout.blocks import BlockLayout, consecutive
from megatron_vita.rounding import ceil_div

GATHERED_TOKENS = 1 << 19
"""Number of keys gathered at a time where a sequence's pages are not consecutive."""
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Shape of a cached token on one rank. `fp8`: stored as E4M3 with a scale for each row."""

    layers: int
    groups: int
    width: int
    dtype: torch.dtype
    fp8: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token."""
        return (
            2
            * self.layers
            * self.groups
            * (self.width + 4 if self.fp8 else self.width * self.dtype.itemsize)
        )


class KeyValueCache:
    """Pages of keys and values [groups, slots, d] by layer, counted from 1 as in megatron-core."""

    def __init__(
        self, layout: BlockLayout, shape: CacheShape, *, blocks: int, device: torch.device
    ) -> None:
        self.layout = layout
        self.dtype = shape.dtype
        slots = blocks * layout.page_tokens
        layers = range(shape.layers)
        rows = (shape.groups, slots, shape.width)
        stored = _FP8 if shape.fp8 else shape.dtype
        self._keys = [torch.zeros(rows, dtype=stored, device=device) for _ in layers]
        self._values = [torch.zeros(rows, dtype=stored, device=device) for _ in layers]
        self._scales: list[Tensor] | None = None
        if shape.fp8:
            self._scales = [torch.zeros(2, *rows[:2], device=device) for _ in layers]

    def write(self, layer: int, key: Tensor, value: Tensor, *, slots: Tensor) -> None:
        """Store rows [n, groups, d] in slots [n]; slots may repeat only in the scratch block."""
        for which, rows in enumerate((key, value)):
            store = (self._keys, self._values)[which][layer - 1]
            rows = rows.transpose(0, 1)  # [groups, n, d]
            if self._scales is not None:
                # A scale for each row keeps outliers of one token from costing the others
                # precision.
                scale = (rows.abs().amax(-1).float() / _FP8_MAX).clamp(min=1e-12)
                self._scales[layer - 1][which, :, slots] = scale
                rows = (rows.float() / scale[..., None]).to(_FP8).view(torch.uint8)
                store = store.view(torch.uint8)
            store[:, slots] = rows

    def rotate_and_write(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        rotation: Rotation,
        slots: Tensor,
    ) -> Tensor:
        """Rotate query [n, heads, d], which is returned, and key [n, groups, d]; store key and
        value."""
        # The fused kernel stores rows as they are.
        if not query.is_cuda or self._scales is not None:
            self.write(layer, rotation.rotate(key), value, slots=slots)
            return rotation.rotate(query)
        from megatron_vita.inference.runner.kernels import rotate_and_store

        return rotate_and_store(
            query, key, value, cos=rotation.cos, sin=rotation.sin,
            keys=self._keys[layer - 1], values=self._values[layer - 1], slots=slots,
        )  # fmt: skip

    def attend_prefix(
        self, layer: int, query: Tensor, *, blocks: Tensor, length: int
    ) -> tuple[Tensor, Tensor] | None:
        """Attend from query [m, heads, d] to the first `length` tokens held here; None if that is
        0."""
        result = None
        for key, value in self._read(layer, blocks, length):
            part = attend(query, key, value)
            result = part if result is None else merge_attention_states(result, part)
        return result

    def _read(self, layer: int, blocks: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values [groups, n, d] of a sequence: as one view where its blocks are
        consecutive, else copied at most GATHERED_TOKENS at a time."""
        page = self.layout.page_tokens
        blocks = blocks[: ceil_div(length, page)]
        if not length:
            return
        # A sequence that was admitted into an empty cache is read in place.
        if self._scales is None and consecutive(blocks):
            start = int(blocks[0]) * page
            here = slice(start, start + length)
            yield self._keys[layer - 1][:, here], self._values[layer - 1][:, here]
            return
        for part in blocks.split(GATHERED_TOKENS // page):
            count = min(length, len(part) * page)
            length -= count
            yield self._gather(layer, 0, part)[:, :count], self._gather(layer, 1, part)[:, :count]

    def _gather(self, layer: int, which: int, blocks: Tensor) -> Tensor:
        """Copy the rows of some blocks into one tensor [groups, n, d]."""
        page = self.layout.page_tokens
        store = (self._keys, self._values)[which][layer - 1]
        blocks = blocks.to(store.device)
        if self._scales is None:
            return store.unflatten(1, (-1, page)).index_select(1, blocks).flatten(1, 2)
        # indexing is not implemented for 8-bit floats
        rows = (
            store.view(torch.uint8)
            .unflatten(1, (-1, page))
            .index_select(1, blocks)
            .flatten(1, 2)
            .view(_FP8)
        )
        scale = (
            self._scales[layer - 1][which]
            .unflatten(1, (-1, page))
            .index_select(1, blocks)
            .flatten(1, 2)
        )
        return rows.to(self.dtype) * scale[..., None].to(self.dtype)

    def attend_decode(
        self, layer: int, query: Tensor, *, tables: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attend from one token of each of B sequences to the pages held here.

        query [B, heads, d]; tables [B, blocks]; lengths [B]. Returns fp32 out [B, heads, d] and
        log-sum-exp [B, heads].
        """
        if query.is_cuda:
            from megatron_vita.inference.runner.kernels import attend_pages

            if self._scales is None:
                scales = None
            else:
                scales = (self._scales[layer - 1][0], self._scales[layer - 1][1])
            return attend_pages(
                query, self._keys[layer - 1], self._values[layer - 1], tables=tables, lengths=lengths,
                page_tokens=self.layout.page_tokens, scales=scales,
            )  # fmt: skip
        out = torch.zeros(query.shape, dtype=torch.float32)
        lse = torch.full(query.shape[:2], -torch.inf)
        for row, length in enumerate(lengths.tolist()):
            part = self.attend_prefix(
                layer, query[row : row + 1], blocks=tables[row], length=length
            )
            if part is not None:
                out[row] = part[0][0]
                lse[row] = part[1][0]
        return out, lse

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, each given as (source, destination)."""
        page = self.layout.page_tokens
        for source, target in pairs:
            old, new = (slice(block * page, (block + 1) * page) for block in (source, target))
            for store in (*self._keys, *self._values):
                store[:, new] = store[:, old]
            for scale in self._scales or ():
                scale[:, :, new] = scale[:, :, old]
