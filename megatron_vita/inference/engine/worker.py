"""A rank's part of a step: its forward pass over its share of the cache."""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.inference.requests.scheduler_output import (
    NewSequence,
    PrefillChunk,
    SchedulerOutput,
)
from megatron_vita.inference.runner.adapters import NO_ADAPTER, ServedAdapters
from megatron_vita.inference.runner.attention import PrefillAttention, PromptPiece, held_places
from megatron_vita.inference.runner.cuda_graphs import GraphPool
from megatron_vita.inference.runner.decode_runner import DecodeRunner
from megatron_vita.inference.runner.kv_cache import KeyValueCache
from megatron_vita.inference.runner.partial_attention import PLANNED_KEYS, PLANNED_ROWS, has_fa4
from megatron_vita.inference.runner.prefill_graphs import LENGTHS, PrefillGraphs, padded_length
from megatron_vita.inference.runner.rotary import Rotation
from megatron_vita.inference.vision.decode_pool import DecodePool
from megatron_vita.inference.vision.features import FeatureSource
from megatron_vita.layout.blocks import cumulative_lengths
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.rounding import round_up


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Logits [rows, V] of prompts that ended or of decoded tokens, None if nothing was computed;
    reasons of failure by sequence; awaited sequences whose tiles are decoded on all ranks."""

    logits: Tensor | None = None
    failed: dict[int, str] = field(default_factory=dict)
    ready: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _PackedPrompts:
    """Prefill chunks laid one after another, each padded, and this CP rank's share of them."""

    pieces: list[PrefillChunk]
    starts: list[int]  # of the pieces in the pack
    held: Tensor  # [T] places in the order of rows gathered over CP
    mine: Tensor  # [t] places that this rank computes
    ids: Tensor  # [T]
    positions: Tensor  # [T] of each place in its sequence
    is_short: bool  # one whole prompt, of a length for which there is a graph

    def local_rows(self, places: Tensor) -> Tensor:
        """This rank's rows that compute pack positions `places`; -1 for those of other ranks."""
        row = torch.full((len(self.ids),), -1)
        row[self.mine] = torch.arange(len(self.mine))
        return row[places]


class Worker:
    """Weights, cache and sequences of one rank. All ranks execute the same steps."""

    def __init__(
        self,
        model: VitaModel,
        cache: KeyValueCache,
        *,
        recipe: Recipe,
        encoder: SampleEncoder,
        readers: DecodePool,
        max_blocks: int,
        adapters: ServedAdapters,
        graphs: bool = True,
    ) -> None:
        self.model = model
        self.cache = cache
        self.graphs = GraphPool() if graphs and platform.on_cuda() else None
        self.features = FeatureSource(
            model, recipe=recipe, encoder=encoder, readers=readers, graphs=self.graphs
        )
        self.decoder = DecodeRunner(
            model.language_model,
            cache,
            max_blocks=max_blocks,
            graphs=self.graphs,
            adapters=adapters,
        )
        self.prefill_graphs: PrefillGraphs | None = None
        if self.graphs:
            self.prefill_graphs = PrefillGraphs(
                model.language_model, cache, graphs=self.graphs, adapters=adapters
            )
        self.adapters = adapters
        self._longest = max_blocks * cache.layout.block_tokens  # tokens of a sequence
        self._tables: dict[int, Tensor] = {}
        self._adapter_of: dict[int, int] = {}  # numbers of adapters by sequence
        self._prompts: dict[int, NewSequence] = {}

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile the kernels of long prompts and record the graphs that single requests need, so
        that the first one does not wait. Collective."""
        if platform.on_cuda() and self._longest >= PLANNED_KEYS:
            self._compile_attention()
        if self.prefill_graphs is not None:
            kinds = [False, True] if self.adapters.names else [False]
            for is_adapted in kinds:
                for length in LENGTHS:
                    # Zigzag over CP needs two equal pieces per rank.
                    if length % (2 * groups.context_group().size()) == 0:
                        self.prefill_graphs.record(length, is_adapted=is_adapted)
                self.decoder.record(1, is_adapted=is_adapted)
            self.features.warm_up()

    def _compile_attention(self) -> None:
        shape = self.model.language_model.shape
        tp = groups.rank_layout().tp_size
        has_fa4(
            heads=shape.num_attention_heads // tp,
            query_groups=shape.query_groups_of_rank(tp),
            width=shape.kv_channels,
            dtype=self.cache.dtype,
        )

    def close(self) -> None:
        """Free all graphs, since a process group cannot be destroyed while they hold its
        operations, and stop decoding."""
        if self.graphs is not None:
            self.graphs.close()
        self.features.decoder.close()

    @torch.no_grad()
    def execute(self, step: SchedulerOutput) -> StepResult:
        """Execute a step. Collective."""
        self._keep_books(step)
        result = StepResult()
        if step.prefill:
            result = self._prefill(step.prefill)
        elif step.decode:
            result = StepResult(logits=self._decode(step))
        if step.awaiting_tiles:
            return replace(result, ready=self._ready(step))
        return result

    def _decode(self, step: SchedulerOutput) -> Tensor:
        return self.decoder.run(step.decode, tables=self._tables, adapters=self._adapter_of)

    def _ready(self, step: SchedulerOutput) -> list[int]:
        """Awaited sequences whose tiles are decoded on all ranks."""
        here = self.features.decoder.ready(step.awaiting_tiles, timeout=step.tile_wait_seconds)
        flags = torch.tensor(
            [sequence in here for sequence in step.awaiting_tiles], dtype=torch.uint8
        )
        if (group := groups.host_group("main")) is not None:
            # A rank decodes only its own tiles; a sequence is ready when every rank's are.
            dist.all_reduce(flags, op=dist.ReduceOp.MIN, group=group)
        return [
            sequence
            for sequence, flag in zip(step.awaiting_tiles, flags.tolist(), strict=True)
            if flag
        ]

    def _keep_books(self, step: SchedulerOutput) -> None:
        for sequence in step.finished:
            self._tables.pop(sequence, None)
            self._adapter_of.pop(sequence, None)
            self._prompts.pop(sequence, None)
            self.features.forget(sequence)
            self.decoder.forget(sequence)
        for start in step.new:
            self._prompts[start.sequence] = start
            self.features.add(start)
        for sequence, blocks in step.block_tables.items():
            self._tables[sequence] = torch.tensor(blocks, dtype=torch.int64)
            self.decoder.forget(sequence)
        self._adapter_of |= step.adapters
        for sequence, blocks in step.new_blocks.items():
            self._tables[sequence] = torch.cat(
                [self._tables[sequence], torch.tensor(blocks, dtype=torch.int64)]
            )
        # Before this step's forward pass, which may write to source and copy.
        self.cache.copy_blocks(step.copy_blocks)
        for tokens in step.prefetch:
            self.features.prefetch(*tokens)

    def _prefill(self, pieces: list[PrefillChunk]) -> StepResult:
        pack = self._lay_out(pieces)
        model = self.model.language_model
        hidden = model.embed_rows(pack.ids[pack.mine].to(platform.device()))  # [t, 1, H]
        failed = self._write_features(hidden, pack)
        if pack.is_short and self.prefill_graphs is not None:
            places, slots = self._stored(pack)
            hidden = self.prefill_graphs.run(
                hidden, places=places, slots=slots, adapters=self._adapter_rows(pack)
            )
        else:
            rows = self._adapter_rows(pack)
            self.adapters.begin(rows.to(platform.device()), is_used=bool(rows.any()))
            hidden = model.run_layers(hidden, attention=self._attention(pack))
        for piece in pieces:
            if piece.ends_prompt:
                self.features.forget(piece.sequence)
        return StepResult(logits=self._logits(hidden.squeeze(1), pack), failed=failed)

    def _adapter_rows(self, pack: _PackedPrompts) -> Tensor:
        """Numbers of the adapters of this rank's rows [t], on the host."""
        bounds = [*pack.starts, len(pack.ids)]
        numbers = torch.empty_like(pack.ids)
        for piece, start, stop in zip(pack.pieces, pack.starts, bounds[1:], strict=True):
            numbers[start:stop] = self._adapter_of.get(piece.sequence, NO_ADAPTER)
        return numbers[pack.mine]

    def _lay_out(self, pieces: list[PrefillChunk]) -> _PackedPrompts:
        ranks = groups.rank_layout().cp_size
        lengths = [_padded(piece.stop - piece.start, ranks) for piece in pieces]
        first = pieces[0]
        if self.prefill_graphs and len(pieces) == 1 and first.start == 0:
            short = padded_length(first.stop)
        else:
            short = None
        # A single short prompt runs as a recorded graph of a fixed length.
        if short is not None and short % (2 * ranks) == 0:
            lengths = [short]
        bounds = cumulative_lengths(lengths)
        ids = [
            F.pad(
                torch.from_numpy(self._prompts[p.sequence].input_ids[p.start : p.stop]),
                (0, length - p.stop + p.start),
            )
            for p, length in zip(pieces, lengths, strict=True)
        ]
        positions = [
            torch.arange(p.start, p.start + length)
            for p, length in zip(pieces, lengths, strict=True)
        ]
        held = held_places(bounds, cp_size=ranks)
        return _PackedPrompts(
            pieces=pieces,
            starts=bounds[:-1].tolist(),
            held=held,
            mine=held.chunk(ranks)[groups.rank_layout().cp_rank],
            ids=torch.cat(ids),
            positions=torch.cat(positions),
            is_short=short is not None and lengths == [short],
        )

    def _write_features(self, hidden: Tensor, pack: _PackedPrompts) -> dict[int, str]:
        """Overwrite the embeddings [t, 1, H] of placeholders; returns reasons of failure by
        sequence, of all ranks."""
        features = self.features.of_pieces(pack.pieces, pack.starts)
        if features is None:
            return {}
        rows = pack.local_rows(features.places)
        here = rows >= 0
        hidden[rows[here].to(hidden.device), 0] = features.rows[here.to(hidden.device)].to(
            hidden.dtype
        )
        group = groups.host_group("main")
        if group is None:
            return features.failed
        reports: list[dict[int, str]] = [{} for _ in range(group.size())]
        # Rank 0 must report failures of tiles that other ranks decoded.
        dist.all_gather_object(reports, features.failed, group=group)
        return {sequence: reason for report in reports for sequence, reason in report.items()}

    def _stored(self, pack: _PackedPrompts) -> tuple[Tensor, Tensor]:
        """Pack positions that are cached on this rank, and their slots."""
        layout = self.cache.layout
        stored = []
        slots = []
        for piece, start in zip(pack.pieces, pack.starts, strict=True):
            here, places = layout.slots(
                torch.arange(piece.start, piece.stop), self._tables[piece.sequence]
            )
            stored.append(start + here.nonzero().squeeze(1))
            slots.append(places)
        return torch.cat(stored), torch.cat(slots)

    def _attention(self, pack: _PackedPrompts) -> PrefillAttention:
        layout = self.cache.layout
        device = platform.device()
        bounds = [*pack.starts, len(pack.ids)]
        pieces = [
            PromptPiece(
                start=start,
                length=stop - start,
                past=layout.local_tokens(piece.start),
                blocks=self._tables[piece.sequence][: layout.blocks_for(piece.start)],
            )
            for piece, start, stop in zip(pack.pieces, pack.starts, bounds[1:], strict=True)
        ]
        stored, slots = self._stored(pack)
        gathered_row = torch.empty_like(pack.held)
        gathered_row[pack.held] = torch.arange(len(pack.held))
        return PrefillAttention(
            cache=self.cache,
            pieces=pieces,
            rotation=Rotation.at(
                pack.positions[pack.mine].to(device),
                inverse_frequencies=self.model.language_model.inverse_frequencies,
                shape=self.model.shapes.language,
            ),
            cp_group=groups.context_group(),
            held=pack.held.to(device),
            gathered_row=gathered_row.to(device),
            stored_rows=stored.to(device),
            slots=slots.to(device),
        )

    def _logits(self, hidden: Tensor, pack: _PackedPrompts) -> Tensor:
        """Logits [rows, V] after the prompts that end in this step: hidden [t, H]."""
        places = [
            start + piece.stop - piece.start - 1
            for piece, start in zip(pack.pieces, pack.starts, strict=True)
            if piece.ends_prompt
        ]
        rows = pack.local_rows(torch.tensor(places, dtype=torch.int64))
        # Each last row is on one CP rank; the sum with the others' zeros gives it to all.
        last = hidden.new_zeros(len(places), hidden.shape[1])
        here = (rows >= 0).nonzero().squeeze(1)
        last[here.to(hidden.device)] = hidden[rows[here].to(hidden.device)]
        if groups.context_group().size() > 1 and places:
            dist.all_reduce(last, group=groups.context_group())
        return self.model.language_model.project(last)


def _padded(length: int, cp_size: int) -> int:
    """Length of a chunk padded to the zigzag of CP, and to cuDNN's multiples where it is long."""
    multiple = 2 * cp_size if cp_size > 1 else 1
    return round_up(
        length, math.lcm(PLANNED_ROWS, multiple) if length >= PLANNED_KEYS else multiple
    )
