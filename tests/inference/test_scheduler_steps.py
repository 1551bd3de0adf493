"""Invariants of the scheduler's steps under random prompts, tiles, readiness and cancels, without a
model."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_vita.inference.engine.block_pool import BlockPool
from megatron_vita.inference.engine.request import Request
from megatron_vita.inference.engine.scheduler import PREFETCH_CHUNKS, Scheduler, SchedulerConfig
from megatron_vita.inference.requests.scheduler_output import SchedulerOutput
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.layout.blocks import BlockLayout

ROWS = 6  # of a tile
BLOCK = 4
POLICY = SchedulerConfig(chunk_tokens=16, busy_chunk_tokens=8, max_running=8, max_context=400)


class World:
    """A scheduler, and in place of the ranks a record of what they were told, which checks each
    step."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.scheduler = Scheduler(
            BlockPool(400), layout=BlockLayout(page_tokens=BLOCK), config=POLICY
        )
        self.open: dict[int, Request] = {}
        # by sequence: of its tiles that were announced
        self.decoded: dict[int, dict[int, bool]] = {}
        self.done: dict[int, int] = {}  # by sequence: tokens of its prompt in the cache

    def add(
        self, number: int, *, gaps: list[int], shared: int = 0, n: int = 1, hangs: bool = False
    ) -> None:
        """A prompt with `gaps` tokens before, between and after its tiles, `shared` of the first
        like others'."""
        placements = np.cumsum(gaps[:-1], dtype=np.int64) + ROWS * np.arange(len(gaps) - 1)
        tokens = sum(gaps) + ROWS * len(placements)
        document = SimpleNamespace(
            input_ids=np.full(tokens, hangs), placements=placements, media=[]
        )
        prepared: Any = SimpleNamespace(
            tokens=tokens, tiles=len(placements), files=[], document=document
        )
        keys = [
            f"{-1 if (k + 1) * BLOCK <= shared else number} {k}".encode()
            for k in range(tokens // BLOCK)
        ]
        sampling = SamplingParams(max_new_tokens=self.rng.randint(1, 12), n=n, temperature=1.0)
        self.open[number] = Request(number=number, prepared=prepared, sampling=sampling, keys=keys)
        self.scheduler.add(self.open[number])

    def step(self, chance: float) -> bool:
        """Decodes each tile by chance, and does one step; false if there is none."""
        budget = POLICY.busy_chunk_tokens if self.scheduler._running else POLICY.chunk_tokens
        step = self.scheduler.next_step()
        if step is None:
            return False
        requests = {r.sequences[0].number: r for r in self.scheduler._prefilling}
        self.hear(self.scheduler.take_changes(), requests)
        assert sum(piece.stop - piece.start for piece in step.prefill) <= budget
        for piece in step.prefill:
            request = requests[piece.sequence]
            assert piece.start == self.done[piece.sequence] < piece.stop
            assert all(
                self.decoded[piece.sequence].get(t)
                for t in tiles_of(request, piece.start, piece.stop)
            )
            assert piece.ends_prompt == (piece.stop == request.prepared.tokens)
            self.done[piece.sequence] = piece.stop
            self.scheduler.cache_blocks(request.sequences[0], request.keys)
        for request in requests.values():
            for tile, decoded in (tiles := self.decoded[request.sequences[0].number]).items():
                tiles[tile] = decoded or (self.may_decode(request) and self.rng.random() < chance)
        self.scheduler.note_ready([s for s in step.awaiting_tiles if all(self.decoded[s].values())])
        for request in self.scheduler._prefilling:
            assert (
                request.sequences[0].length
                <= request.ready
                <= request.prefetched
                <= request.prepared.tokens
            )
        ahead = sum(
            len(tiles_of(r, r.sequences[0].length + ROWS - 1, r.prefetched))
            for r in self.scheduler._prefilling
        )
        # and cut ones
        assert ahead * ROWS <= PREFETCH_CHUNKS * POLICY.chunk_tokens + ROWS * len(
            self.scheduler._prefilling
        )
        for piece in step.prefill:
            if piece.ends_prompt:
                self.scheduler.start_decoding(
                    requests[piece.sequence], requests[piece.sequence].width
                )
        self.end_answers({sequence for sequence, _, _ in step.decode})
        return True

    def hear(self, changes: SchedulerOutput, requests: dict[int, Request]) -> None:
        for start in changes.new:
            self.decoded[start.sequence] = {}
            self.done[start.sequence] = requests[start.sequence].cached_tokens
        for sequence, first, stop in changes.prefetch:
            for tile in tiles_of(requests[sequence], first, stop):
                self.decoded[sequence].setdefault(tile, False)

    def end_answers(self, decoded: set[int]) -> None:
        for request in list(self.scheduler._running):
            longest = request.prepared.tokens + request.sampling.max_new_tokens - 1
            for sequence in [
                s for s in request.sequences if s.number in decoded and s.length >= longest
            ]:
                self.scheduler.finish_sequence(request, sequence)
            if not request.sequences:
                del self.open[request.number]

    def may_decode(self, request: Request) -> bool:
        return not request.prepared.document.input_ids[0]

    def cancel(self, number: int) -> None:
        self.scheduler.finish(self.open.pop(number))


def tiles_of(request: Request, start: int, stop: int) -> list[int]:
    return [
        t for t, at in enumerate(request.prepared.document.placements) if start - ROWS < at < stop
    ]


@pytest.mark.parametrize("seed", range(60))
def test_pieces_follow_one_another_when_their_tiles_are_there_and_everything_ends(
    seed: int,
) -> None:
    rng = random.Random(seed)
    world = World(rng)
    chance = rng.choice([0.02, 0.2, 1.0])
    hangs = rng.choice([0.0, 0.3])
    for number in range(30):
        gaps = [
            rng.choice([0, 1, 7, 16, 20, 50]),
            *rng.choices([0, 0, 1, 9], k=rng.choice([0, 0, 1, 3, 12])),
            5,
        ]
        shared = rng.choice([0, 8, 20]) if len(gaps) == 2 else min(gaps[0], 20)
        hang = len(gaps) > 2 and rng.random() < hangs
        world.add(number, gaps=gaps, shared=shared, n=rng.randint(1, 3), hangs=hang)
        for _ in range(rng.choice([0, 1, 5, 20])):
            world.step(chance)
        if world.open and rng.random() < 0.2:
            world.cancel(rng.choice(list(world.open)))
    for turn in range(5000):
        if not world.step(chance):
            break
        hanging = [
            number for number, r in world.open.items() if r.sequences and not world.may_decode(r)
        ]
        if hanging and turn % 100 == 99:  # it is given up
            world.cancel(hanging[0])
    assert (world.open, world.scheduler.has_work, world.scheduler.pool.used) == ({}, False, 0)


def test_text_waits_for_no_tiles_of_others() -> None:
    world = World(random.Random(1))
    world.add(0, gaps=[0, 100])
    world.step(1.0)
    for number in range(1, 6):
        world.add(number, gaps=[0] * 12, hangs=True)
    world.add(6, gaps=[100])
    for _ in range(100):
        world.step(1.0)
    assert list(world.open) == [1, 2, 3, 4, 5]


def test_a_beginning_shared_with_tiles_that_cannot_be_announced_yet_is_computed() -> None:
    world = World(random.Random(1))
    for number in range(4):
        world.add(number, gaps=[0] * 12, hangs=True)
    world.add(4, gaps=[12, *[0] * 12], shared=12, hangs=True)
    world.add(5, gaps=[40], shared=12)
    for _ in range(100):
        world.step(1.0)
    assert list(world.open) == [0, 1, 2, 3, 4]
