"""Feature rows of tiles: each tile is encoded once, by one rank, in the step that computes its
first placeholder."""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from megatron_vita import platform
from megatron_vita.config import Recipe
from megatron_vita.data.samples.encoding import SampleEncoder
from megatron_vita.inference.requests.scheduler_output import NewSequence, PrefillChunk
from megatron_vita.inference.runner.cuda_graphs import Graph, GraphPool
from megatron_vita.inference.vision.decode_pool import DecodePool
from megatron_vita.inference.vision.tile_decoder import TileDecoder, TileKey
from megatron_vita.layout.assignment import assign_tiles
from megatron_vita.media.normalize import normalize
from megatron_vita.model.vita import VitaModel
from megatron_vita.parallel import groups
from megatron_vita.parallel.collectives import concatenate_rows

_FEW_TILES = 8
"""As many are encoded by CUDA graphs: their time is that of launching kernels."""


@dataclass(frozen=True, kw_only=True)
class FeatureRows:
    """Feature rows [m, H], the pack positions [m] that they overwrite, and reasons of failure by
    sequence."""

    rows: Tensor
    places: Tensor
    failed: dict[int, str]


class FeatureSource:
    """Encodes the tiles of a step's prefill chunks over all ranks."""

    def __init__(
        self,
        model: VitaModel,
        *,
        recipe: Recipe,
        encoder: SampleEncoder,
        readers: DecodePool,
        graphs: GraphPool | None,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.graphs = graphs
        # by number of tiles: their pixels, and what encodes them
        self._graphs: dict[int, tuple[Tensor, Graph]] = {}
        self.normalization = recipe.media.normalization
        self.rows_per_tile = encoder.vision.image_token_length
        self.decoder = TileDecoder(readers)
        self._sequences: dict[int, NewSequence] = {}
        # of sequences' tiles that are assigned, the tile rank
        self._owner: dict[int, dict[int, int]] = {}
        self._left: dict[TileKey, Tensor] = {}  # features whose placeholders a piece cut in two

    def add(self, start: NewSequence) -> None:
        """Register a sequence whose chunks will come."""
        self._sequences[start.sequence] = start
        self._owner[start.sequence] = {}
        self.decoder.add(start)

    def forget(self, sequence: int) -> None:
        """Drop a sequence that has ended."""
        self._sequences.pop(sequence, None)
        self._owner.pop(sequence, None)
        self.decoder.forget(sequence)
        for key in [key for key in self._left if key[0] == sequence]:
            del self._left[key]

    def of_pieces(self, pieces: list[PrefillChunk], places: list[int]) -> FeatureRows | None:
        """Feature rows of chunks that begin at `places` of the pack; None if they have no tiles.
        Collective."""
        tiles = list(
            chain.from_iterable(self._tiles_of(p.sequence, p.start, p.stop) for p in pieces)
        )
        if not tiles or not self.model.encodes:
            return None
        # A tile whose placeholders span two chunks is encoded once, with the first.
        new = [tile for tile in tiles if tile not in self._left]
        features, failed = self._encode(new)
        known = self._left | dict(zip(new, features, strict=True))
        rows = []
        targets = []
        for piece, place in zip(pieces, places, strict=True):
            for key in self._tiles_of(piece.sequence, piece.start, piece.stop):
                begin = int(self._sequences[piece.sequence].placements[key[1]])
                first = max(begin, piece.start)
                last = min(begin + self.rows_per_tile, piece.stop)
                rows.append(known[key][first - begin : last - begin])
                targets.append(torch.arange(first, last) - piece.start + place)
                if begin + self.rows_per_tile > piece.stop:
                    # A copy, since a slice would keep the features of the whole chunk alive.
                    self._left[key] = known[key].clone()
                else:
                    self._left.pop(key, None)
        return FeatureRows(rows=torch.cat(rows), places=torch.cat(targets), failed=failed)

    def prefetch(self, sequence: int, start: int, stop: int) -> None:
        """Assign the unassigned tiles of tokens `start` to `stop` to ranks, and start decoding this
        rank's.

        Ranks take turns to be the first, so that many prompts of one tile do not all go to one
        rank.
        """
        owner = self._owner[sequence]
        layout = groups.rank_layout()
        tiles = [tile for _, tile in self._tiles_of(sequence, start, stop) if tile not in owner]
        # Frames and image tiles are assigned separately: decoding a frame costs more.
        frames = torch.tensor([self._is_frame(sequence, tile) for tile in tiles], dtype=torch.bool)
        for rank, assigned in enumerate(assign_tiles(frames, layout.tile_ranks), start=sequence):
            owner.update({tiles[i]: rank % layout.tile_ranks for i in assigned})
        if self.model.encodes:
            self.decoder.begin(
                sequence, [tile for tile in tiles if owner[tile] == layout.tile_rank]
            )

    def _tiles_of(self, sequence: int, start: int, stop: int) -> list[TileKey]:
        """Tiles that have placeholders among tokens `start` to `stop`."""
        placements = self._sequences[sequence].placements
        first = int(np.searchsorted(placements, start - self.rows_per_tile, side="right"))
        last = int(np.searchsorted(placements, stop))
        return [(sequence, tile) for tile in range(first, last)]

    def _is_frame(self, sequence: int, tile: int) -> bool:
        ends = np.cumsum([medium.num_tiles for medium in self._sequences[sequence].media])
        return (
            self._sequences[sequence].media[int(np.searchsorted(ends, tile, side="right"))].grid
            is None
        )

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode uint8 pixels [n, 3, S, S] into features [n, rows, H]."""
        dtype = self.model.config.params_dtype
        tiles = normalize(pixels.to(platform.device()), self.normalization, dtype=dtype)
        if self.graphs is None or not 0 < len(tiles) <= _FEW_TILES:
            return self.model.encode(tiles)
        # Powers of two keep the number of graphs small.
        buffer, graph = self._graph_for(1 << (len(tiles) - 1).bit_length())
        buffer[: len(tiles)] = tiles
        # The next launch overwrites the output.
        return graph.launch()[: len(tiles)].clone()

    def warm_up(self) -> None:
        """Record the graphs of few tiles. Collective where the tower is split over TP."""
        for exponent in range(_FEW_TILES.bit_length() if self.graphs and self.model.encodes else 0):
            self._graph_for(1 << exponent)

    def _graph_for(self, size: int) -> tuple[Tensor, Graph]:
        assert self.graphs is not None, "tiles are encoded without graphs here"
        if size not in self._graphs:
            side = self.encoder.vision.image_size
            dtype = self.model.config.params_dtype
            buffer = torch.zeros(size, 3, side, side, dtype=dtype, device=platform.device())
            self._graphs[size] = (buffer, self.graphs.record(lambda: self.model.encode(buffer)))
        return self._graphs[size]

    def _encode(self, tiles: list[TileKey]) -> tuple[Tensor, dict[int, str]]:
        """Features [n, rows, H] of tiles, on every rank, and reasons of failure by sequence."""
        dtype = self.model.config.params_dtype
        if not tiles:
            return torch.empty(
                0, self.rows_per_tile, self.model.config.hidden_size, dtype=dtype
            ), {}
        layout = groups.rank_layout()
        owners = torch.tensor([self._owner[sequence][tile] for sequence, tile in tiles])
        assignments = [(owners == rank).nonzero().squeeze(1) for rank in range(layout.tile_ranks)]
        pixels, failed = self.decoder.take([tiles[i] for i in assignments[layout.tile_rank]])
        own = self._encode_pixels(torch.from_numpy(pixels))
        if layout.tile_ranks == 1:
            return own, failed
        everything = concatenate_rows(
            own, counts=[len(assigned) for assigned in assignments], group=groups.tile_group()
        )
        # Rows come rank by rank; callers expect the order of tiles.
        order = torch.argsort(torch.cat(assignments)).to(everything.device)
        return everything[order], failed
