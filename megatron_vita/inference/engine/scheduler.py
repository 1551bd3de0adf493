"""Which requests are worked on in a step. Rank 0 alone decides; nothing here touches the device.

Each request is promised the blocks that its prompt and its longest answers take before it begins,
so that none is ever stopped for want of room. Steps with pieces of prompts and steps with new
tokens take turns.
"""

import itertools
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_vita.inference.engine.block_pool import BlockPool
from megatron_vita.inference.prompt import PreparedPrompt
from megatron_vita.inference.requests import SamplingParams
from megatron_vita.inference.step import PiecePlan, SequenceStart, Step
from megatron_vita.layout.blocks import BlockLayout

PATIENCE = 0.02
"""Seconds for which ranks that have nothing else to do wait for tiles, before they look for new requests."""
AHEAD = 4
"""Chunks whose tiles may be decoded, or wait to be, at a time: what they take of memory."""
OLDEST_FIRST = 4
"""Of so many steps with pieces of prompts, the last begins with the oldest prompt."""
LONG_WAIT = 10
"""Steps that a prompt waits for its first tiles, before the blocks that precede them are computed without: others may
share them. Sooner would cut a short prompt in two."""


@dataclass(kw_only=True)
class Sequence:
    """Tokens with a place in the cache."""

    number: int
    blocks: list[int]
    length: int = 0  # tokens in the cache, or in the step under way
    next_token: int = -1  # drawn, and not yet in the cache


@dataclass(kw_only=True)
class Request:
    """A prompt on its way to its answers."""

    number: int
    prepared: PreparedPrompt
    sampling: SamplingParams
    keys: list[bytes]  # of the prompt's whole blocks
    cached_tokens: int = 0
    # one while the prompt is computed, then one per answer
    sequences: list[Sequence] = field(default_factory=list)
    ceiling: int = 0  # blocks that it may come to hold
    held: int = 0  # blocks that its sequences hold, each counted once
    running: bool = False  # its answers are under way
    announced: int = 0  # tokens of the prompt whose tiles are being decoded, or are
    ready: int = 0  # those of which all ranks have decoded theirs
    waits: int = 0  # steps since something of it could be computed

    @property
    def width(self) -> int:
        """Answers that are decoded at a time."""
        return max(self.sampling.n, self.sampling.num_beams)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much is done at a time."""

    chunk_tokens: int
    busy_chunk_tokens: int  # the same while answers are waiting for their next tokens
    max_running: int
    max_context: int


class Scheduler:
    """The waiting, the prompts under way and the answers under way."""

    def __init__(self, pool: BlockPool, *, layout: BlockLayout, policy: Policy) -> None:
        self.pool, self.layout, self.policy = pool, layout, policy
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self._numbers = itertools.count()
        self._changes = Step()  # bookkeeping for the next step
        self._decoded_last = False
        self._pieces = 0  # steps with pieces of prompts

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.waiting or self.prefilling or self.running)

    def ceiling_of(self, tokens: int, sampling: SamplingParams) -> int:
        """The most blocks that a request can come to hold."""
        longest = min(tokens + sampling.max_new_tokens, self.policy.max_context)
        whole = tokens // self.layout.block_tokens
        width = max(sampling.n, sampling.num_beams)
        tail = self.layout.blocks_for(longest) - whole
        # beams are copied before they end
        return whole + width * tail + (width if sampling.num_beams > 1 else 0)

    def next_step(self) -> Step | None:
        """What to do next; None if there is nothing to do."""
        self._admit()
        self._announce()
        step = None
        if not (self.running and not self._decoded_last):
            step = self._prefill()
        awaited = [
            request.sequences[0].number
            for request in self.prefilling
            if request.ready < request.announced
        ]
        step = step or self._decode() or (Step(patience=PATIENCE) if awaited else None)
        if step is None:
            return None
        self._decoded_last = bool(step.decode)
        return replace(step, awaited=awaited)

    def note_ready(self, sequences: list[int]) -> None:
        """Awaited sequences whose announced tiles are decoded."""
        for request in self.prefilling:
            if request.sequences[0].number in sequences:
                request.ready = request.announced
            request.waits = request.waits + 1 if request.ready == request.sequences[0].length else 0

    def take_changes(self) -> Step:
        """Bookkeeping that the next step must carry, even where nothing is left to compute."""
        changes, self._changes = self._changes, Step()
        return changes

    def end(self, request: Request) -> None:
        """A request gives back all that it holds, wherever it stands."""
        for group in (self.waiting, self.prefilling, self.running):
            if request in group:
                group.remove(request)
        for sequence in list(request.sequences):
            self.end_sequence(request, sequence)

    def end_sequence(self, request: Request, sequence: Sequence) -> None:
        """One answer of a request needs its tokens no longer."""
        request.sequences.remove(sequence)
        request.held -= len(sequence.blocks) - _shared_blocks(sequence, request.sequences)
        self.pool.give_back(sequence.blocks)
        self._changes.forget.append(sequence.number)
        self._changes.tables.pop(sequence.number, None)  # of a copy that no step has seen
        if not request.sequences and request in self.running:
            self.running.remove(request)

    def start_answers(self, request: Request, width: int) -> None:
        """A prompt is computed: it becomes `width` sequences that share its whole blocks."""
        self.prefilling.remove(request)
        self.running.append(request)
        request.running = True
        first = request.sequences[0]
        request.sequences += [self.fork(request, first) for _ in range(width - 1)]

    def fork(self, request: Request, parent: Sequence) -> Sequence:
        """A sequence with the same tokens: whole blocks are shared, what is left is copied."""
        whole, rest = divmod(parent.length, self.layout.block_tokens)
        child = Sequence(
            number=next(self._numbers), blocks=parent.blocks[:whole], length=parent.length
        )
        self.pool.share(child.blocks)
        if rest:
            child.blocks += self._take(request, 1)
            self._changes.copy.append((parent.blocks[whole], child.blocks[whole]))
        self._changes.tables[child.number] = list(child.blocks)
        return child

    def remember(self, sequence: Sequence, keys: list[bytes]) -> None:
        """Whole blocks that are computed can be shared from now on."""
        whole = sequence.length // self.layout.block_tokens
        for block, key in zip(sequence.blocks[:whole], keys[:whole], strict=False):
            self.pool.remember(block, key)

    def _take(self, request: Request, number: int) -> list[int]:
        request.held += number
        return self.pool.take(number)

    def _promised(self) -> int:
        """Blocks that requests under way may still take."""
        return sum(request.ceiling - request.held for request in (*self.prefilling, *self.running))

    def _admit(self) -> None:
        """Lets requests begin in the order in which they came, but for those that wait for others'
        blocks."""
        for request in list(self.waiting):
            # The last token is always computed, for its logits.
            keys = request.keys[: (request.prepared.tokens - 1) // self.layout.block_tokens]
            known = self.pool.known(keys)
            if any(
                keys[len(known) : len(known) + 1] == other.keys[len(known) : len(known) + 1] != []
                for other in self.prefilling
            ):
                continue  # what it needs next is being computed
            answers = sum(r.width for r in (*self.prefilling, *self.running))
            room = self.pool.available_beside(known) - self._promised()
            request.ceiling = self.ceiling_of(request.prepared.tokens, request.sampling)
            if request.ceiling - len(known) > room or (
                answers and answers + request.width > self.policy.max_running
            ):
                return
            self.waiting.remove(request)
            self._begin(request, known)

    def _begin(self, request: Request, known: list[int]) -> None:
        self.pool.share(known)
        request.cached_tokens = len(known) * self.layout.block_tokens
        request.held = len(known)
        more = self._take(request, self.layout.blocks_for(request.prepared.tokens) - len(known))
        sequence = Sequence(
            number=next(self._numbers), blocks=known + more, length=request.cached_tokens
        )
        request.sequences = [sequence]
        stop = min(sequence.length + self._chunk, request.prepared.tokens)
        request.announced = request.ready = stop if stop <= _head(request) else sequence.length
        self.prefilling.append(request)
        document = request.prepared.document
        self._changes.begin.append(
            SequenceStart(
                sequence=sequence.number,
                input_ids=document.input_ids,
                placements=document.placements,
                media=document.media,
                files=request.prepared.files,
            )
        )
        self._changes.tables[sequence.number] = list(sequence.blocks)

    @property
    def _chunk(self) -> int:
        """Tokens of prompts in a step."""
        return self.policy.busy_chunk_tokens if self.running else self.policy.chunk_tokens

    def _in_turn(self) -> list[Request]:
        """The prompts under way, those with the least left first, so that a short one never waits
        long; but now and then the oldest first, so that a long one gets on however many short ones
        come.
        """
        if self._pieces % OLDEST_FIRST == OLDEST_FIRST - 1:
            return list(self.prefilling)
        return sorted(self.prefilling, key=lambda request: (_left(request), request.number))

    def _announce(self) -> None:
        """Has the tiles of coming pieces decoded: of each prompt two pieces ahead, of all together
        a bounded number."""
        ahead = sum(
            r.announced - r.sequences[0].length for r in self.prefilling if r.prepared.tiles
        )
        for request in self._in_turn():
            sequence, start = request.sequences[0], request.announced
            stop = min(start + self._chunk, request.prepared.tokens)
            if request.ready < start or start == stop or start - sequence.length > self._chunk:
                continue
            if _has_tiles(request, start, stop):  # text waits for nobody's tiles
                ahead += stop - start
                if ahead > AHEAD * self.policy.chunk_tokens:
                    continue
            request.announced = stop
            self._changes.announce.append((sequence.number, start, stop))

    def _prefill(self) -> Step | None:
        """Pieces of the prompts under way, as far as their tiles are decoded."""
        budget = self._chunk
        pieces = []
        for request in self._in_turn():
            sequence = request.sequences[0]
            count = min(budget, self._computable(request) - sequence.length)
            if count <= 0:
                continue
            budget -= count
            start, sequence.length = sequence.length, sequence.length + count
            request.ready = max(request.ready, sequence.length)
            request.announced = max(request.announced, sequence.length)
            ends = _left(request) == 0
            pieces.append(
                PiecePlan(
                    sequence=sequence.number, start=start, stop=sequence.length, ends_prompt=ends
                )
            )
        self._pieces += bool(pieces)
        return Step(prefill=pieces) if pieces else None

    def _computable(self, request: Request) -> int:
        """Tokens of the prompt that wait for no tile."""
        if request.waits < LONG_WAIT:
            return request.ready
        return max(
            request.ready, _head(request) // self.layout.block_tokens * self.layout.block_tokens
        )

    def _decode(self) -> Step | None:
        rows, grow = [], {}
        for request in self.running:
            for sequence in request.sequences:
                if sequence.length == len(sequence.blocks) * self.layout.block_tokens:
                    grow[sequence.number] = self._take(request, 1)
                    sequence.blocks += grow[sequence.number]
                rows.append((sequence.number, sequence.next_token, sequence.length))
                sequence.length += 1
        return Step(decode=rows, grow=grow) if rows else None


def _left(request: Request) -> int:
    """Tokens of the prompt that are not yet computed."""
    return request.prepared.tokens - request.sequences[0].length


def _head(request: Request) -> int:
    """Tokens before the first tile, which wait for nothing."""
    return (
        int(request.prepared.document.placements[0])
        if request.prepared.tiles
        else request.prepared.tokens
    )


def _has_tiles(request: Request, start: int, stop: int) -> bool:
    """Whether a tile begins among these tokens of the prompt."""
    first, last = np.searchsorted(request.prepared.document.placements, (start, stop))
    return bool(first < last)


def _shared_blocks(sequence: Sequence, others: list[Sequence]) -> int:
    """Of a sequence's blocks, those that one of the others begins with as well."""
    most = 0
    for other in others:
        shared = min(len(sequence.blocks), len(other.blocks))
        while shared > most and sequence.blocks[shared - 1] != other.blocks[shared - 1]:
            shared -= 1
        most = max(most, shared)
    return most
