"""CUDA graphs of single short prompts, whose time would otherwise be that of launching kernels."""

import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.inference.runner.adapters import ServedAdapters
from megatron_vita.inference.runner.attention import PrefillAttention, PromptPiece, held_places
from megatron_vita.inference.runner.cuda_graphs import Graph, GraphPool
from megatron_vita.inference.runner.kv_cache import KeyValueCache
from megatron_vita.inference.runner.rotary import Rotation
from megatron_vita.layout.blocks import SCRATCH_BLOCK
from megatron_vita.model.language import LanguageModel
from megatron_vita.parallel import groups

LENGTHS = (*range(64, 513, 64), *range(640, 1025, 128))
"""Padded lengths for which there are graphs."""


def padded_length(length: int) -> int | None:
    """Length of the smallest graph that a prompt fits; None if it is too long for any."""
    return next((known for known in LENGTHS if known >= length), None)


class PrefillGraphs:
    """The layers over whole prompts of each of LENGTHS."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KeyValueCache,
        *,
        graphs: GraphPool,
        adapters: ServedAdapters,
    ) -> None:
        self.model = model
        self.cache = cache
        self.graphs = graphs
        self.adapters = adapters
        # by length, and by whether the prompt has an adapter: embeddings, slots, numbers of
        # adapters, graph
        self._graphs: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor, Graph]] = {}

    def run(self, hidden: Tensor, *, places: Tensor, slots: Tensor, adapters: Tensor) -> Tensor:
        """Last hidden states of embeddings [t, 1, H]: this rank's rows of a prompt of one of
        LENGTHS.

        Keys at positions `places` of the prompt are stored at `slots`; `adapters` [t] are the
        numbers of the rows' adapters.
        """
        length = len(hidden) * groups.context_group().size()
        # The same on all ranks: all rows are of one prompt, padding too.
        is_adapted = bool(adapters.any())
        if (length, is_adapted) not in self._graphs:
            self.record(length, is_adapted=is_adapted)
        embeddings, all_slots, numbers, graph = self._graphs[length, is_adapted]
        embeddings.copy_(hidden)
        numbers.copy_(adapters)
        # The graph stores every row; padding and other ranks' rows go to the scratch block.
        everywhere = torch.full((length,), SCRATCH_BLOCK * self.cache.layout.page_tokens)
        everywhere[places] = slots
        all_slots.copy_(everywhere)
        return graph.launch()

    def record(self, length: int, *, is_adapted: bool) -> None:
        """Record the graph of a length, with or without adapters. Collective."""
        device = platform.device()
        ranks = groups.context_group().size()
        rank = groups.context_group().rank()
        held = held_places(torch.tensor([0, length]), cp_size=ranks)
        gathered_row = torch.empty_like(held)
        gathered_row[held] = torch.arange(length)
        slots = torch.full((length,), SCRATCH_BLOCK * self.cache.layout.page_tokens, device=device)
        attention = PrefillAttention(
            cache=self.cache,
            pieces=[
                PromptPiece(
                    start=0, length=length, past=0, blocks=torch.empty(0, dtype=torch.int64)
                )
            ],
            rotation=Rotation.at(
                held.chunk(ranks)[rank].to(device),
                inverse_frequencies=self.model.inverse_frequencies,
                shape=self.model.shape,
            ),
            cp_group=groups.context_group(),
            held=held.to(device),
            gathered_row=gathered_row.to(device),
            stored_rows=torch.arange(length, device=device),
            slots=slots,
        )
        shape = (length // ranks, 1, self.model.config.hidden_size)
        embeddings = torch.zeros(shape, dtype=self.model.config.params_dtype, device=device)
        numbers = torch.zeros(length // ranks, dtype=torch.int64, device=device)

        def run_layers() -> Tensor:
            self.adapters.begin(numbers, is_used=is_adapted)
            return self.model.run_layers(embeddings, attention=attention)

        self._graphs[length, is_adapted] = (
            embeddings,
            slots,
            numbers,
            self.graphs.record(run_layers),
        )
