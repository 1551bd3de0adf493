"""Blocks that requests hold and reserve, and what is left of requests after their end."""

from pathlib import Path

import pytest
import torch

from megatron_vita import platform
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams
from tests.inference.tiny import picture, tiny_engine

RED = Prompt.ask("is there a red circle")
MANY = {
    "answers": SamplingParams(max_new_tokens=30, n=8, temperature=1.0, seed=1, ignore_eos=True),
    "uneven answers": SamplingParams(max_new_tokens=30, n=8, temperature=1.0, seed=2),
    "beams": SamplingParams(max_new_tokens=60, num_beams=8, ignore_eos=True),
    "one token": SamplingParams(max_new_tokens=1, n=8, temperature=1.0, seed=3, ignore_eos=True),
}


@pytest.fixture(scope="module", autouse=True)
def process() -> None:
    platform.initialize_process()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(
        tmp_path_factory.mktemp("engine"), cache_tokens=900, chunk_tokens=64, busy_chunk_tokens=32
    )


@pytest.mark.parametrize("sampling", MANY.values(), ids=MANY.keys())
def test_what_a_request_holds_and_may_still_take_is_its_ceiling(
    engine: Engine, sampling: SamplingParams
) -> None:
    scheduler = engine._scheduler
    number = engine.add(engine.prepare(RED), sampling)
    (request,) = scheduler._waiting
    while engine.has_work:
        engine.step()
        assert request.held_blocks == len(
            {block for sequence in request.sequences for block in sequence.blocks}
        )
        assert request.held_blocks <= request.reserved_blocks
        if request.sequences:
            assert scheduler._unclaimed_blocks() == request.reserved_blocks - request.held_blocks
    engine.forget(number)
    assert (request.held_blocks, engine._pool.used) == (0, 0)


def test_beams_keep_their_room_whoever_comes_meanwhile(engine: Engine) -> None:
    beams = engine.add(
        engine.prepare(RED), SamplingParams(max_new_tokens=100, num_beams=8, ignore_eos=True)
    )
    ended = []
    for turn in range(100_000):
        if turn >= 50 and len(engine._scheduler._waiting) < 2:
            words = Prompt.ask(
                f"{['red', 'blue', 'cats', 'two'][turn % 4]} " + "yes " * (turn % 60)
            )
            engine.add(engine.prepare(words), SamplingParams(max_new_tokens=40, ignore_eos=True))
        ended += [piece for piece in engine.step() if piece.finish]
        if any(piece.request == beams for piece in ended):
            break
    assert {piece.finish for piece in ended} == {"length"}
    while engine.has_work:
        engine.step()
    assert engine._pool.used == 0


@pytest.mark.parametrize("sampling", MANY.values(), ids=MANY.keys())
@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_nothing_is_left_of_ended_or_cancelled_requests(
    engine: Engine, sampling: SamplingParams, steps: int
) -> None:
    number = engine.add(engine.prepare(RED), sampling)
    for _ in range(steps):
        if engine.has_work:
            engine.step()
    engine.cancel(number)
    engine.step()
    engine.forget(number)
    engine.idle()
    assert not engine.has_work
    assert (engine.worker._tables, engine.worker._prompts) == ({}, {})
    assert engine._pool.used == 0


def test_chunks_are_never_larger_than_they_may_be(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, chunk_tokens=8, busy_chunk_tokens=64)
    engine.add(engine.prepare(RED), SamplingParams(max_new_tokens=30, ignore_eos=True))
    while not engine._scheduler._running:
        engine.step()
    engine.add(engine.prepare(Prompt.ask("no cats " * 9)), SamplingParams(max_new_tokens=2))
    while engine.has_work:
        step = engine._scheduler.next_step()
        assert step is not None
        assert sum(piece.stop - piece.start for piece in step.prefill) <= 8
        engine._process(step, engine._execute(step))


def test_a_long_prompt_gets_on_however_many_short_ones_come(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, chunk_tokens=16, busy_chunk_tokens=16)
    one = SamplingParams(max_new_tokens=1)
    long = engine.add(engine.prepare(Prompt.ask("no cats " * 45)), one)
    for turn in range(200):
        while len(engine._scheduler._prefilling) + len(engine._scheduler._waiting) < 5:
            engine.add(
                engine.prepare(Prompt.ask(f"{['red', 'blue', 'cats', 'two'][turn % 4]} {turn}")),
                one,
            )
        if any(piece.request == long for piece in engine.step()):
            return
    pytest.fail("the long prompt is never computed")


def test_a_short_prompt_with_an_image_is_computed_in_one_piece(tmp_path: Path) -> None:
    """The graphs of short prompts, and the tiles of chunks, depend on it."""
    engine = tiny_engine(tmp_path, chunk_tokens=512, page_tokens=128)
    engine.add(
        engine.prepare(Prompt.ask("what color", images=[picture(1)])),
        SamplingParams(max_new_tokens=1),
    )
    pieces = []
    while engine.has_work:
        step = engine._scheduler.next_step()
        assert step is not None
        pieces += step.prefill
        engine._process(step, engine._execute(step))
    assert [(piece.start, piece.ends_prompt) for piece in pieces] == [(0, True)]


def test_pieces_of_a_prompt_with_images_are_whole_chunks(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, chunk_tokens=16, page_tokens=128)
    images = [picture(seed, (16, 16)) for seed in range(6)]
    engine.add(
        engine.prepare(Prompt.ask("what color", images=images)), SamplingParams(max_new_tokens=1)
    )
    starts = []
    while engine.has_work:
        step = engine._scheduler.next_step()
        assert step is not None
        starts += [piece.start for piece in step.prefill]
        engine._process(step, engine._execute(step))
    assert starts == list(range(0, 16 * len(starts), 16))
    assert len(starts) > 2


def test_numbers_that_went_wrong_are_not_shared(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path)
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompts = [RED, Prompt.ask("is there a red circle or two cats")]
    weight = next(engine.model.language_model.decoder.layers[0].parameters())
    right = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        (failed,) = engine.generate([RED], sampling=sampling)
        weight.copy_(right)
    assert failed.finish == "model_error"
    answers = engine.generate(prompts, sampling=sampling)
    assert [answer.finish for answer in answers] == ["length", "length"]
