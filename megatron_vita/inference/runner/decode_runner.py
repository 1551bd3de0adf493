"""Decode steps in few batch sizes, so that CUDA graphs can replay the forward pass."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.inference.runner.adapters import NO_ADAPTER, ServedAdapters
from megatron_vita.inference.runner.attention import DecodeAttention
from megatron_vita.inference.runner.cuda_graphs import Graph, GraphPool
from megatron_vita.inference.runner.kv_cache import KeyValueCache
from megatron_vita.inference.runner.rotary import Rotation
from megatron_vita.layout.blocks import SCRATCH_BLOCK
from megatron_vita.model.language import LanguageModel
from megatron_vita.parallel import groups

_FIELDS = ("ids", "positions", "slots", "lengths", "adapters")


class DecodeBuffers:
    """Inputs of a decode step of `size` sequences, at fixed addresses."""

    def __init__(self, size: int, *, blocks: int) -> None:
        device = platform.device()
        self.host = torch.zeros(
            len(_FIELDS), size, dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        self.device = torch.zeros(len(_FIELDS), size, dtype=torch.int64, device=device)
        self.tables = torch.zeros(size, blocks, dtype=torch.int32, device=device)
        # which sequence's table a row has, and how much of it
        self.shown: list[tuple[int, int]] = [(-1, 0)] * size
        # by whether any row has an adapter
        self.graphs: dict[bool, Graph] = {}

    def set_table(self, row: int, sequence: int, blocks: Tensor) -> None:
        """Update the block table of a row."""
        shown, count = self.shown[row]
        # Only new blocks are copied: a table of a long sequence has thousands.
        first = count if shown == sequence else 0
        if first < len(blocks):
            self.tables[row, first : len(blocks)] = blocks[first:].int().to(self.tables.device)
        self.shown[row] = (sequence, len(blocks))


class DecodeRunner:
    """Runs decode steps in batch sizes that are powers of two."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KeyValueCache,
        *,
        max_blocks: int,
        graphs: GraphPool | None,
        adapters: ServedAdapters,
    ) -> None:
        self.model = model
        self.cache = cache
        self.max_blocks = max_blocks
        self.graphs = graphs
        self.adapters = adapters
        self._batches: dict[int, DecodeBuffers] = {}

    def run(
        self,
        rows: list[tuple[int, int, int]],
        *,
        tables: dict[int, Tensor],
        adapters: Mapping[int, int],
    ) -> Tensor:
        """Logits [B, V] for rows of (sequence, token, position), whose block tables are in
        `tables`, and whose adapters' numbers in `adapters` if they have one."""
        batch = self._batch_for(len(rows))
        layout = self.cache.layout
        # of padding: no keys
        inputs = [[0, 0, SCRATCH_BLOCK * layout.page_tokens, 0, NO_ADAPTER]] * len(batch.shown)
        for row, (sequence, token, position) in enumerate(rows):
            blocks = tables[sequence]
            batch.set_table(row, sequence, blocks)
            slot = layout.slot(position, blocks)
            inputs[row] = [
                token,
                position,
                inputs[row][2] if slot is None else slot,
                layout.local_tokens(position + 1),
                adapters.get(sequence, NO_ADAPTER),
            ]
        # One pinned copy for all inputs of a step.
        batch.host.copy_(torch.tensor(inputs).T)
        batch.device.copy_(batch.host, non_blocking=True)
        is_adapted = any(sequence in adapters for sequence, _, _ in rows)
        if self.graphs is None:
            return self._forward(batch, is_adapted=is_adapted)[: len(rows)]
        return self.record(len(rows), is_adapted=is_adapted).launch()[: len(rows)]

    def record(self, rows: int, *, is_adapted: bool) -> Graph:
        """Return the graph for a number of rows, with or without adapters; it is recorded if it
        does not exist yet. Collective."""
        assert self.graphs is not None, "this decoder works without graphs"
        batch = self._batch_for(rows)
        if is_adapted not in batch.graphs:
            batch.graphs[is_adapted] = self.graphs.record(
                lambda: self._forward(batch, is_adapted=is_adapted)
            )
        return batch.graphs[is_adapted]

    def forget(self, sequence: int) -> None:
        """Drop the buffered block table of a sequence that has new blocks or has ended."""
        for batch in self._batches.values():
            batch.shown = [(-1, 0) if shown[0] == sequence else shown for shown in batch.shown]

    def _batch_for(self, rows: int) -> DecodeBuffers:
        # Few sizes mean few graphs, at the price of at most half a batch of padding.
        size = 1 << (rows - 1).bit_length()
        if size not in self._batches:
            self._batches[size] = DecodeBuffers(size, blocks=self.max_blocks)
        return self._batches[size]

    def _forward(self, batch: DecodeBuffers, *, is_adapted: bool) -> Tensor:
        ids, positions, slots, lengths, adapters = batch.device
        self.adapters.begin(adapters, is_used=is_adapted)
        attention = DecodeAttention(
            cache=self.cache,
            rotation=Rotation.at(
                positions,
                inverse_frequencies=self.model.inverse_frequencies,
                shape=self.model.shape,
            ),
            cp_group=groups.context_group(),
            tables=batch.tables,
            lengths=lengths.int(),
            slots=slots,
        )
        hidden = self.model.run_layers(self.model.embed_rows(ids), attention=attention)
        return self.model.project(hidden.squeeze(1))
