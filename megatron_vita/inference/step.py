"""What rank 0 tells all ranks to do: one forward pass, and the bookkeeping that comes with it."""

from dataclasses import dataclass, field

import numpy as np

from megatron_vita.data.samples.encoding import Medium
from megatron_vita.inference.prompt import MediaFile


@dataclass(frozen=True, kw_only=True)
class SequenceStart:
    """A sequence whose prompt is to be computed."""

    sequence: int
    input_ids: np.ndarray  # int64 [L]
    placements: np.ndarray  # int64 [N], first placeholder of each tile
    media: list[Medium]
    files: list[MediaFile]  # of `media`


@dataclass(frozen=True, kw_only=True)
class PiecePlan:
    """Tokens `start` to `stop` of a sequence's prompt."""

    sequence: int
    start: int
    stop: int
    ends_prompt: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """Either pieces of prompts or one token of each of several sequences is computed, or nothing.

    What else is said comes first, but for `awaited`, which comes last.
    """

    forget: list[int] = field(default_factory=list)  # sequences that have ended
    begin: list[SequenceStart] = field(default_factory=list)
    # blocks of sequences, in place of those they had
    tables: dict[int, list[int]] = field(default_factory=dict)
    # blocks that sequences get in addition
    grow: dict[int, list[int]] = field(default_factory=dict)
    copy: list[tuple[int, int]] = field(default_factory=list)  # blocks to copy: (from, to)
    # sequence, first token, last: tiles to decode
    announce: list[tuple[int, int, int]] = field(default_factory=list)
    prefill: list[PiecePlan] = field(default_factory=list)
    # sequence, its next token, that one's position
    decode: list[tuple[int, int, int]] = field(default_factory=list)
    # sequences of which rank 0 must know whether tiles are decoded
    awaited: list[int] = field(default_factory=list)
    patience: float = 0.0  # seconds to wait for the first of them
    close: bool = False  # the service ends
