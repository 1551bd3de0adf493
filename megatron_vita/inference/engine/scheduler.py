"""Continuous batching: decides which requests a step works on. Runs on rank 0 alone and never
touches the device.

A request is admitted only once the blocks of its prompt and of its longest answers are reserved, so
that no running request is ever preempted for want of room. Prefill and decode steps alternate.
"""

import itertools
from collections import deque
from dataclasses import dataclass, replace

from megatron_vita.inference.engine.block_pool import BlockPool
from megatron_vita.inference.engine.request import Request, Sequence
from megatron_vita.inference.requests.scheduler_output import (
    NewSequence,
    PrefillChunk,
    SchedulerOutput,
)
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.layout.blocks import BlockLayout

TILE_WAIT_SECONDS = 0.02
"""Longest wait for tiles when ranks have nothing else to do, before new requests are looked for."""
PREFETCH_CHUNKS = 4
"""Most chunks of prompts whose tiles are decoded ahead at a time: bounds the host memory of tiles."""
FIFO_EVERY = 4
"""Every n-th prefill step serves the oldest prompt first, so that long prompts never starve."""
TILE_WAIT_STEPS = 10
"""After this many steps without decoded tiles, a prompt's full blocks before its first tile are computed anyway, so that
other requests can share them. Earlier would split short prompts in two."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and of all requests together."""

    chunk_tokens: int
    busy_chunk_tokens: int  # the same while answers wait for their next tokens
    max_running: int
    max_context: int


@dataclass(frozen=True, kw_only=True)
class RequestCounts:
    """Number of requests by state."""

    waiting: int
    running: int  # prompts and answers


class Scheduler:
    """Queues of requests: waiting, being prefilled, being decoded."""

    def __init__(self, pool: BlockPool, *, layout: BlockLayout, config: SchedulerConfig) -> None:
        self.pool = pool
        self.layout = layout
        self.config = config
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._running: list[Request] = []
        self._numbers = itertools.count()
        self._changes = SchedulerOutput()  # bookkeeping for the next step
        self._decoded_last = False
        self._prefill_steps = 0

    @property
    def has_work(self) -> bool:
        """True if a step would compute something."""
        return bool(self._waiting or self._prefilling or self._running)

    @property
    def counts(self) -> RequestCounts:
        """Number of requests that wait, and that are under way."""
        return RequestCounts(
            waiting=len(self._waiting), running=len(self._running) + len(self._prefilling)
        )

    @property
    def admitted(self) -> list[Request]:
        """Requests under way: those whose prompts are computed, then those that are decoded."""
        return [*self._prefilling, *self._running]

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append(request)

    def blocks_needed(self, tokens: int, sampling: SamplingParams) -> int:
        """Most blocks that a request with a prompt of `tokens` tokens can come to hold."""
        longest = min(tokens + sampling.max_new_tokens, self.config.max_context)
        shared = tokens // self.layout.block_tokens
        width = max(sampling.n, sampling.num_beams)
        own = self.layout.blocks_for(longest) - shared
        needed = shared + width * own
        if sampling.num_beams > 1:
            needed += width  # new beams are copied before old ones end
        return needed

    def longest_answer(self, tokens: int, sampling: SamplingParams) -> int:
        """Most new tokens of each answer for which an empty cache has room; below 1 where a prompt
        of `tokens` tokens can have no answer."""
        shared = tokens // self.layout.block_tokens
        width = max(sampling.n, sampling.num_beams)
        copies = width if sampling.num_beams > 1 else 0
        own = (self.pool.count - 1 - shared - copies) // width
        return (shared + own) * self.layout.block_tokens - tokens

    def next_step(self) -> SchedulerOutput | None:
        """Schedule a step; None if there is nothing to do."""
        self._admit()
        self._prefetch_tiles()
        step = None
        # Prefill and decode alternate, so that neither a stream of prompts nor running outputs
        # starve the other.
        if self._decoded_last or not self._running:
            step = self._prefill()
        # Ranks agree on finished tiles in a collective; asking only for these keeps it short.
        awaiting = [
            request.sequences[0].number
            for request in self._prefilling
            if request.ready < request.prefetched
        ]
        step = step or self._decode()
        # Nothing can be computed until tiles arrive: ranks wait a moment instead of spinning.
        if step is None and awaiting:
            step = SchedulerOutput(tile_wait_seconds=TILE_WAIT_SECONDS)
        if step is None:
            return None
        self._decoded_last = bool(step.decode)
        return replace(step, awaiting_tiles=awaiting)

    def note_ready(self, sequences: list[int]) -> None:
        """Record that all prefetched tiles of these sequences are decoded on all ranks."""
        for request in self._prefilling:
            if request.sequences[0].number in sequences:
                request.ready = request.prefetched
            # No computable token is left: see TILE_WAIT_STEPS.
            if request.ready == request.sequences[0].length:
                request.tile_wait_steps += 1
            else:
                request.tile_wait_steps = 0

    def take_changes(self) -> SchedulerOutput:
        """Bookkeeping that the next step must carry, even where nothing is left to compute."""
        changes = self._changes
        self._changes = SchedulerOutput()
        return changes

    def finish(self, request: Request) -> None:
        """Remove a request in whatever state, and free all of its blocks."""
        for queue in (self._waiting, self._prefilling, self._running):
            if request in queue:
                queue.remove(request)
        for sequence in list(request.sequences):
            self.finish_sequence(request, sequence)

    def finish_sequence(self, request: Request, sequence: Sequence) -> None:
        """Free the blocks of one answer."""
        request.sequences.remove(sequence)
        # Blocks that another sequence of the request still holds remain counted.
        request.held_blocks -= len(sequence.blocks) - _shared_blocks(sequence, request.sequences)
        self.pool.free(sequence.blocks)
        self._changes.finished.append(sequence.number)
        # a fork that no step has seen yet
        self._changes.block_tables.pop(sequence.number, None)
        self._changes.adapters.pop(sequence.number, None)
        if not request.sequences and request in self._running:
            self._running.remove(request)

    def invalidate(self, request: Request) -> None:
        """Remove what was computed for a request from the prefix cache: it may be wrong."""
        for sequence in request.sequences:
            self.pool.invalidate(sequence.blocks)

    def start_decoding(self, request: Request, width: int) -> None:
        """Turn a computed prompt into `width` sequences that share its full blocks."""
        self._prefilling.remove(request)
        self._running.append(request)
        request.running = True
        first = request.sequences[0]
        request.sequences += [self.fork(request, first) for _ in range(width - 1)]

    def fork(self, request: Request, parent: Sequence) -> Sequence:
        """A sequence with the same tokens: full blocks are shared, a last partial one is copied."""
        # Both sequences will write to the last partial block, so each needs its own; full blocks
        # are never written again and can be shared.
        full, rest = divmod(parent.length, self.layout.block_tokens)
        child = Sequence(
            number=next(self._numbers), blocks=parent.blocks[:full], length=parent.length
        )
        self.pool.share(child.blocks)
        if rest:
            child.blocks += self._allocate(request, 1)
            self._changes.copy_blocks.append((parent.blocks[full], child.blocks[full]))
        self._changes.block_tables[child.number] = list(child.blocks)
        self._note_adapter(request, child)
        return child

    def cache_blocks(self, sequence: Sequence, keys: list[bytes]) -> None:
        """Let the computed full blocks of a sequence be shared."""
        full = sequence.length // self.layout.block_tokens
        for block, key in zip(sequence.blocks[:full], keys[:full], strict=False):
            self.pool.cache_block(block, key)

    def _allocate(self, request: Request, number: int) -> list[int]:
        request.held_blocks += number
        return self.pool.allocate(number)

    def _unclaimed_blocks(self) -> int:
        """Blocks that are reserved for requests under way and not yet allocated."""
        return sum(request.reserved_blocks - request.held_blocks for request in self.admitted)

    def _admit(self) -> None:
        """Start waiting requests in their order, as far as there is room.

        A request whose next block is being computed by another waits for it, and lets others pass:
        to compute that block a second time would cost more than the wait.
        """
        for request in list(self._waiting):
            # The last token is always computed, for its logits.
            keys = request.keys[: (request.prepared.tokens - 1) // self.layout.block_tokens]
            cached = self.pool.match_prefix(keys)
            if self._is_being_computed(keys, len(cached)):
                continue
            # Later requests do not overtake: a large one would otherwise wait forever for room.
            if not self._has_room(request, cached):
                return
            self._waiting.remove(request)
            self._start_prefill(request, cached)

    def _is_being_computed(self, keys: list[bytes], block: int) -> bool:
        """True if an admitted prompt will hold block number `block` of a prompt with `keys`."""
        if block == len(keys):
            return False
        return any(
            block < len(other.keys) and other.keys[block] == keys[block]
            for other in self._prefilling
        )

    def _has_room(self, request: Request, cached: list[int]) -> bool:
        """Check that the blocks of a request fit beside those already reserved, and reserve them."""
        request.reserved_blocks = self.blocks_needed(request.prepared.tokens, request.sampling)
        room = self.pool.available_beside(cached) - self._unclaimed_blocks()
        if request.reserved_blocks - len(cached) > room:
            return False
        decoding = sum(other.width for other in self.admitted)
        # a request that is wider than the limit may run alone
        return decoding == 0 or decoding + request.width <= self.config.max_running

    def _start_prefill(self, request: Request, cached: list[int]) -> None:
        self.pool.share(cached)
        request.cached_tokens = len(cached) * self.layout.block_tokens
        request.held_blocks = len(cached)
        # Blocks of the whole prompt are taken at once; those of the output one by one.
        missing = self.layout.blocks_for(request.prepared.tokens) - len(cached)
        sequence = Sequence(
            number=next(self._numbers),
            blocks=cached + self._allocate(request, missing),
            length=request.cached_tokens,
        )
        request.sequences = [sequence]
        self._prefilling.append(request)
        first_chunk = min(sequence.length + self._chunk_tokens, request.prepared.tokens)
        # A first chunk without tiles is ready at once; any other waits for its tiles as a whole.
        waits = first_chunk > request.tokens_before_tiles
        request.ready = sequence.length if waits else first_chunk
        request.prefetched = request.ready
        document = request.prepared.document
        self._changes.new.append(
            NewSequence(
                sequence=sequence.number,
                input_ids=document.input_ids,
                placements=document.placements,
                media=document.media,
                files=request.prepared.files,
            )
        )
        self._changes.block_tables[sequence.number] = list(sequence.blocks)
        self._note_adapter(request, sequence)

    def _note_adapter(self, request: Request, sequence: Sequence) -> None:
        if request.adapter:
            self._changes.adapters[sequence.number] = request.adapter

    @property
    def _chunk_tokens(self) -> int:
        """Prompt tokens in a step."""
        # Running outputs pause during a prefill step, so it is kept short while there are any.
        if self._running:
            return self.config.busy_chunk_tokens
        return self.config.chunk_tokens

    def _prefill_order(self) -> list[Request]:
        """Prompts under way, shortest remaining first, so that a short one never waits long; every
        `FIFO_EVERY` steps oldest first, so that a long one progresses however many short ones come.
        """
        # _prefilling is in order of admission.
        if self._prefill_steps % FIFO_EVERY == FIFO_EVERY - 1:
            return list(self._prefilling)
        return sorted(
            self._prefilling, key=lambda request: (request.prompt_tokens_left, request.number)
        )

    def _prefetch_tiles(self) -> None:
        """Have the tiles of coming chunks decoded: at most two chunks ahead for each prompt, and
        `PREFETCH_CHUNKS` of all together."""
        ahead = sum(
            request.prefetched - request.sequences[0].length
            for request in self._prefilling
            if request.prepared.tiles
        )
        for request in self._prefill_order():
            sequence = request.sequences[0]
            start = request.prefetched
            stop = min(start + self._chunk_tokens, request.prepared.tokens)
            waits_for_tiles = request.ready < start
            far_ahead = start - sequence.length > self._chunk_tokens
            # A second chunk is prefetched only when the first one's tiles are decoded.
            if waits_for_tiles or far_ahead or start == stop:
                continue
            if request.has_tiles(start, stop):  # text takes no room, and so is never held back
                ahead += stop - start
                if ahead > PREFETCH_CHUNKS * self.config.chunk_tokens:
                    continue
            request.prefetched = stop
            self._changes.prefetch.append((sequence.number, start, stop))

    def _prefill(self) -> SchedulerOutput | None:
        """Chunks of the prompts under way, as far as their tiles are decoded."""
        budget = self._chunk_tokens
        chunks = []
        for request in self._prefill_order():
            sequence = request.sequences[0]
            start = sequence.length
            count = min(budget, self._computable(request) - start)
            if count <= 0:
                continue
            budget -= count
            sequence.length = start + count
            # The scheduler may compute beyond the prefetched tokens where no tiles come
            # (TILE_WAIT_STEPS).
            request.ready = max(request.ready, sequence.length)
            request.prefetched = max(request.prefetched, sequence.length)
            chunks.append(
                PrefillChunk(
                    sequence=sequence.number,
                    start=start,
                    stop=sequence.length,
                    ends_prompt=request.prompt_tokens_left == 0,
                )
            )
        if not chunks:
            return None
        self._prefill_steps += 1
        return SchedulerOutput(prefill=chunks)

    def _computable(self, request: Request) -> int:
        """Prompt tokens that wait for no tile."""
        if request.tile_wait_steps < TILE_WAIT_STEPS:
            return request.ready
        full_blocks = request.tokens_before_tiles // self.layout.block_tokens
        return max(request.ready, full_blocks * self.layout.block_tokens)

    def _decode(self) -> SchedulerOutput | None:
        """The next token of each answer under way."""
        rows = []
        new_blocks = {}
        for request in self._running:
            for sequence in request.sequences:
                # The new token begins a block. There is room: it was reserved at admission.
                if sequence.length == len(sequence.blocks) * self.layout.block_tokens:
                    new_blocks[sequence.number] = self._allocate(request, 1)
                    sequence.blocks += new_blocks[sequence.number]
                rows.append((sequence.number, sequence.next_token, sequence.length))
                sequence.length += 1
        if not rows:
            return None
        return SchedulerOutput(decode=rows, new_blocks=new_blocks)


def _shared_blocks(sequence: Sequence, others: list[Sequence]) -> int:
    """Length of the longest prefix of a sequence's blocks that one of `others` begins with."""
    most = 0
    for other in others:
        shared = min(len(sequence.blocks), len(other.blocks))
        # Blocks are shared from the first on, so the last shared one tells of all before it.
        while shared > most and sequence.blocks[shared - 1] != other.blocks[shared - 1]:
            shared -= 1
        most = max(most, shared)
    return most
