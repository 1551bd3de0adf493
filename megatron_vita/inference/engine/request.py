"""A request from admission to its end, and its sequences in the cache."""

from dataclasses import dataclass, field

import numpy as np

from megatron_vita.inference.engine.options import Usage
from megatron_vita.inference.generation.beams import BeamSearch
from megatron_vita.inference.generation.choice_state import ChoiceState
from megatron_vita.inference.requests.prompt import PreparedPrompt
from megatron_vita.inference.requests.types import SamplingParams


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Tokens with a place in the cache."""

    number: int
    blocks: list[int]
    length: int = 0  # tokens in the cache, counting those of the step under way
    next_token: int = -1  # sampled, and not yet in the cache


@dataclass(kw_only=True, eq=False)
class Request:
    """One prompt and its answers: what the scheduler, the cache and sampling know of it."""

    number: int
    prepared: PreparedPrompt
    sampling: SamplingParams
    keys: list[bytes]  # hashes of the prompt's full blocks
    adapter: int = 0  # its number; 0: the base model
    # text side: one state for each of the n answers, or a beam search over all of them
    choices: list[ChoiceState] = field(default_factory=list)
    beams: BeamSearch | None = None
    # cache side: one sequence while the prompt is computed, then one for each answer
    sequences: list[Sequence] = field(default_factory=list)
    sequence_of_choice: dict[int, Sequence] = field(default_factory=dict)
    cached_tokens: int = 0
    reserved_blocks: int = 0  # the most that it may come to hold
    held_blocks: int = 0  # that its sequences hold, each counted once
    running: bool = False  # the prompt is computed, answers are being decoded
    # prompt tokens whose tiles are being decoded or are decoded, and those decoded on all ranks
    prefetched: int = 0
    ready: int = 0
    tile_wait_steps: int = 0  # consecutive steps in which no token of it could be computed

    @property
    def width(self) -> int:
        """Sequences that it decodes at a time."""
        return max(self.sampling.n, self.sampling.num_beams)

    @property
    def prompt_tokens_left(self) -> int:
        """Prompt tokens that are not yet computed."""
        return self.prepared.tokens - self.sequences[0].length

    @property
    def tokens_before_tiles(self) -> int:
        """Prompt tokens before the first tile, which can be computed at once."""
        if self.prepared.tiles:
            return int(self.prepared.document.placements[0])
        return self.prepared.tokens

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self.prepared.tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=sum(len(choice.ids) for choice in self.choices),
        )

    def has_tiles(self, start: int, stop: int) -> bool:
        """True if a tile begins among prompt tokens `start` to `stop`."""
        first, last = np.searchsorted(self.prepared.document.placements, (start, stop))
        return bool(first < last)
