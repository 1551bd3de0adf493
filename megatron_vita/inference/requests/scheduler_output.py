"""The scheduler's decisions for one step, broadcast from rank 0 to all ranks."""

from dataclasses import dataclass, field

import numpy as np

from megatron_vita.data.samples.encoding import Medium
from megatron_vita.inference.requests.prompt import MediaFile


@dataclass(frozen=True, kw_only=True)
class NewSequence:
    """A sequence whose prompt has to be prefilled."""

    sequence: int
    input_ids: np.ndarray  # int64 [L]
    placements: np.ndarray  # int64 [N], first placeholder of each tile
    media: list[Medium]
    files: list[MediaFile]  # of `media`


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """Prompt tokens `start` to `stop` of a sequence."""

    sequence: int
    start: int
    stop: int
    ends_prompt: bool


@dataclass(frozen=True, kw_only=True)
class SchedulerOutput:
    """One step: prefill chunks, or one decode token for each of several sequences, or neither.

    Workers apply the fields in the order of their definition.
    """

    finished: list[int] = field(default_factory=list)  # sequences to forget
    new: list[NewSequence] = field(default_factory=list)
    # sequence -> its whole block table, in place of the one it had
    block_tables: dict[int, list[int]] = field(default_factory=dict)
    # sequence -> blocks to append to its table
    new_blocks: dict[int, list[int]] = field(default_factory=dict)
    # sequence -> number of its adapter, of those that have one
    adapters: dict[int, int] = field(default_factory=dict)
    copy_blocks: list[tuple[int, int]] = field(default_factory=list)  # (source, destination)
    # (sequence, start, stop): tokens whose tiles are to be decoded ahead
    prefetch: list[tuple[int, int, int]] = field(default_factory=list)
    prefill: list[PrefillChunk] = field(default_factory=list)
    # (sequence, its next token, that token's position)
    decode: list[tuple[int, int, int]] = field(default_factory=list)
    # sequences of which rank 0 must know whether all ranks have decoded their tiles
    awaiting_tiles: list[int] = field(default_factory=list)
    tile_wait_seconds: float = 0.0  # longest wait for the first of them
    close: bool = False  # workers return after this step
