"""Answers of the engine are those of whole forward passes, whatever the chunks, the batch and what
was there before."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita import platform
from megatron_vita.config import ParallelConfig
from megatron_vita.errors import ConfigError, DataError, EngineError
from megatron_vita.inference.engine.engine import Engine
from megatron_vita.inference.engine.options import EngineOptions
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.scheduler_output import SchedulerOutput
from megatron_vita.inference.requests.types import CompletionOutput, OutputDelta, SamplingParams
from tests.inference.tiny import picture, prompts, tiny_engine, tiny_recipe, video, whole_logprobs

GREEDY = SamplingParams(max_new_tokens=10, logprobs=3, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    platform.initialize_process()
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return tiny_engine(folder)


def assert_is_whole_forward(engine: Engine, prompt: Prompt, answer: CompletionOutput) -> None:
    """Assert that each token is the likeliest, with log-probabilities of one forward pass over
    everything."""
    rows = whole_logprobs(engine, engine.prepare(prompt), answer.token_ids)
    for row, token, score in zip(rows, answer.token_ids, answer.scores, strict=False):
        assert row.argmax().item() == token == score.chosen.token_id
        values, ids = row.topk(3)
        assert [s.token_id for s in score.likeliest] == ids.tolist()
        torch.testing.assert_close(
            torch.tensor([s.logprob for s in score.likeliest]), values, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(("chunk", "page"), [(1, 4), (7, 4), (24, 16), (1000, 128)])
def test_any_chunks_and_pages_give_the_whole_forward(folder: Path, chunk: int, page: int) -> None:
    engine = tiny_engine(folder, chunk_tokens=chunk, busy_chunk_tokens=chunk, page_tokens=page)
    for prompt, answer in zip(prompts(), engine.generate(prompts(), sampling=GREEDY), strict=True):
        assert_is_whole_forward(engine, prompt, answer)


def test_an_answer_does_not_depend_on_when_others_come_and_go(engine: Engine) -> None:
    alone = [engine.generate([prompt], sampling=GREEDY)[0] for prompt in prompts()]
    numbers = []
    pieces = []
    for prompt in prompts():
        numbers.append(engine.add(engine.prepare(prompt), GREEDY))
        pieces += [piece for _ in range(3) for piece in engine.step()]
    engine.cancel(numbers[1])
    while engine.has_work:
        pieces += engine.step()
    for number, answer in zip(numbers, alone, strict=True):
        tokens = [token for piece in of(pieces, number) for token in piece.token_ids]
        if number == numbers[1]:
            assert of(pieces, number)[-1].finish == "cancelled"
            assert tokens == answer.token_ids[: len(tokens)]
        else:
            assert tokens == answer.token_ids
        engine.forget(number)


def test_ids_beyond_the_embedding_never_reach_the_model(engine: Engine) -> None:
    prepared = engine.prepare(prompts()[0])
    rows = engine.recipe.model.language.vocab_size
    prepared.document.input_ids[1] = rows
    with pytest.raises(DataError, match=f"token {rows}, but the model's embedding {rows} rows"):
        engine.add(prepared, GREEDY)
    assert not engine.has_work


def test_a_tokenizer_of_more_entries_than_rows_is_refused_at_the_start(folder: Path) -> None:
    recipe = tiny_recipe(folder).replaced({"model.language.vocab_size": 300})
    with pytest.raises(ConfigError, match=r"vocab_size is 300, but the tokenizer .* 320 entries"):
        Engine(recipe)


def of(pieces: list[OutputDelta], number: int, choice: int = 0) -> list[OutputDelta]:
    return [piece for piece in pieces if (piece.request, piece.choice) == (number, choice)]


def test_a_beginning_that_is_known_is_not_computed_again_and_changes_nothing(folder: Path) -> None:
    engine = tiny_engine(folder)
    first, other = (
        Prompt.ask(text, videos=[video()]) for text in ("what is in this", "is there a cat")
    )
    engine.generate([first], sampling=GREEDY)
    number = engine.add(prepared := engine.prepare(other), GREEDY)
    pieces = []
    while engine.has_work:
        pieces += engine.step()
    assert engine.usage(number).cached_tokens >= prepared.tokens * 0.6
    answer = CompletionOutput(
        text="",
        token_ids=[token for piece in pieces for token in piece.token_ids],
        finish="length",
        scores=[score for piece in pieces for score in piece.scores],
    )
    assert_is_whole_forward(engine, other, answer)


def test_other_pictures_behind_the_same_tokens_are_not_taken_for_known(folder: Path) -> None:
    engine = tiny_engine(folder)
    for seed in (1, 2, 3):
        prompt = Prompt.ask("what color", images=[picture(seed)])
        assert_is_whole_forward(engine, prompt, engine.generate([prompt], sampling=GREEDY)[0])


def test_a_conversation_goes_on_from_its_last_answer(folder: Path) -> None:
    engine = tiny_engine(folder)
    question = Prompt.ask("what color is the shape", images=[picture(1)])
    engine.generate([question], sampling=GREEDY)
    later = [
        *question.messages,
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "is this a cat"},
    ]
    prompt = Prompt(messages=later, images=question.images)
    number = engine.add(engine.prepare(prompt), GREEDY)
    while engine.has_work:
        engine.step()
    assert engine.usage(number).cached_tokens > engine.prepare(question).tokens * 0.8


def test_the_cache_never_holds_more_than_it_has_and_all_is_answered(folder: Path) -> None:
    engine = tiny_engine(folder, cache_tokens=160)
    asked = [Prompt.ask("two images", images=[picture(seed)]) for seed in range(8)]
    together = engine.generate(asked, sampling=GREEDY)
    for prompt, answer in itertools.islice(zip(asked, together, strict=True), 0, None, 3):
        assert_is_whole_forward(engine, prompt, answer)
    assert engine.statistics().cache_tokens_used == 0
    assert engine.statistics().running == engine.statistics().waiting == 0


def test_a_short_prompt_does_not_wait_for_a_long_one(engine: Engine) -> None:
    long = engine.add(engine.prepare(Prompt.ask("what is in this " * 4, videos=[video(8)])), GREEDY)
    engine.step()
    short = engine.add(
        engine.prepare(Prompt.ask("yes")), SamplingParams(max_new_tokens=1, ignore_eos=True)
    )
    order = []
    while engine.has_work:
        order += [piece.request for piece in engine.step()]
    assert order[0] == short
    assert long in order


def test_the_same_seed_draws_the_same_and_another_differs(engine: Engine) -> None:
    def draw(seed: int) -> list[int]:
        sampling = SamplingParams(max_new_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)
        return engine.generate(prompts()[:1], sampling=sampling)[0].token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_answers_of_one_request_differ_and_each_is_drawn_as_if_alone(engine: Engine) -> None:
    sampling = SamplingParams(
        max_new_tokens=12, temperature=1.0, seed=5, n=3, logprobs=0, ignore_eos=True
    )
    answers = engine.generate(prompts()[:1], sampling=sampling)
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    for answer in answers:
        rows = whole_logprobs(engine, engine.prepare(prompts()[0]), answer.token_ids)
        expected = rows[:-1].gather(1, torch.tensor(answer.token_ids)[:, None]).squeeze(1)
        actual = torch.tensor([score.chosen.logprob for score in answer.scores])
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_eight_bits_of_cache_change_log_probabilities_little(folder: Path, engine: Engine) -> None:
    small = tiny_engine(folder, cache_dtype="fp8")
    exact, rounded = (
        e.generate(prompts()[:1], sampling=GREEDY)[0].scores[1] for e in (engine, small)
    )
    difference = abs(exact.likeliest[0].logprob - rounded.likeliest[0].logprob)
    assert 0 < difference < 0.05


def test_a_worker_that_fails_in_any_way_is_one_clear_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: SchedulerOutput) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "receive_step", SchedulerOutput)
    monkeypatch.setattr(engine.worker, "execute", fail)
    with pytest.raises(
        EngineError, match="cannot go on: a rank is gone or failed: CUDA out of memory"
    ):
        engine.serve_as_worker()


def test_a_damaged_picture_fails_its_own_request_alone(engine: Engine) -> None:
    whole = picture(1)
    cut = MediaFile(name="cut.png", data=whole.data[: len(whole.data) // 2])
    asked = [Prompt.ask("what color", images=[cut]), Prompt.ask("what color", images=[whole])]
    damaged, good = engine.generate(asked, sampling=GREEDY)
    assert damaged.finish == "error"
    assert "cut.png" in damaged.error
    assert_is_whole_forward(engine, asked[1], good)


def test_a_damaged_video_fails_its_own_request_alone(engine: Engine) -> None:
    broken = MediaFile(name="broken.mp4", data=video().data[:-2000])
    with pytest.raises(DataError, match=r"broken\.mp4"):
        engine.prepare(Prompt.ask("what is in this", videos=[broken]))


def test_logits_that_are_no_numbers_end_answers_as_the_models_fault(folder: Path) -> None:
    engine = tiny_engine(folder)
    with torch.no_grad():
        next(engine.model.language_model.decoder.layers[0].parameters()).fill_(torch.nan)
    for sampling in (GREEDY, SamplingParams(max_new_tokens=4, num_beams=2)):
        (answer,) = engine.generate([Prompt.ask("what color")], sampling=sampling)
        assert (answer.finish, answer.token_ids) == ("model_error", [])
        assert "highest logit is nan in 1 of 1 answers" in answer.error


def test_a_literal_tag_in_a_question_is_text(engine: Engine) -> None:
    prepared = engine.prepare(Prompt.ask("is <image> a red circle"))
    assert prepared.tiles == 0
    special = {engine.tokenizer.special_id(name) for name in ("<image>", "<img>", "<IMG_CONTEXT>")}
    assert not special & set(prepared.document.input_ids.tolist())


def test_what_can_never_be_answered_is_refused_with_numbers(folder: Path) -> None:
    engine = tiny_engine(folder, cache_tokens=64, max_running=2)
    long = engine.prepare(Prompt.ask("what is in this", videos=[video(8)]))
    with pytest.raises(DataError, match=rf"prompt of {long.tokens} tokens.*cache, which has 64"):
        engine.add(long, GREEDY)
    with pytest.raises(DataError, match="at most 256 are possible"):
        engine.add(engine.prepare(Prompt.ask("yes " * 300)), GREEDY)
    with pytest.raises(DataError, match="3 answers at a time"):
        engine.add(engine.prepare(Prompt.ask("yes")), SamplingParams(n=3))


@pytest.mark.parametrize(
    "options", [{}, {"n": 2}, {"num_beams": 2}, {"n": 2, "num_beams": 3}], ids=str
)
def test_an_answer_is_no_longer_than_the_cache_has_room_for(
    folder: Path, options: dict[str, Any]
) -> None:
    engine = tiny_engine(folder, cache_tokens=64)
    prepared = engine.prepare(Prompt.ask("is there a red circle"))
    asked = SamplingParams(max_new_tokens=100, ignore_eos=True, **options)
    engine.add(prepared, asked)
    longest = engine._requests[0].sampling.max_new_tokens
    scheduler = engine._scheduler
    blocks = [
        scheduler.blocks_needed(prepared.tokens, dataclasses.replace(asked, max_new_tokens=tokens))
        for tokens in (longest, longest + 1)
    ]
    assert blocks[0] <= 64 // 4 < blocks[1]
    pieces = []
    while engine.has_work:
        pieces += engine.step()
    assert {piece.finish for piece in pieces} <= {None, "length"}
    assert len([piece for piece in pieces if piece.finish]) == options.get("n", 1)


def test_layouts_that_cannot_serve_are_refused_by_name(folder: Path) -> None:
    recipe = tiny_recipe(folder, parallel=ParallelConfig(pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size is 2"):
        Engine(recipe)
    recipe = tiny_recipe(folder, parallel=ParallelConfig(context_parallel_size=2))
    with pytest.raises(ConfigError, match=r"1 processes.*is 2"):
        Engine(recipe)


@pytest.mark.parametrize(
    ("field", "value", "beside"),
    [
        ("num_attention_heads", 9, {"num_query_groups": 3}),
        ("num_query_groups", 3, {"num_attention_heads": 6}),
        ("ffn_hidden_size", 63, {}),
    ],
)
def test_matrices_that_ranks_cannot_share_evenly_are_refused_by_name(
    folder: Path, field: str, value: int, beside: dict[str, int]
) -> None:
    fields = {field: value} | beside
    recipe = tiny_recipe(folder).replaced({f"model.language.{n}": v for n, v in fields.items()})
    with pytest.raises(
        ConfigError, match=f"^model.language.{field} {value} is n(ot|either) a multiple"
    ):
        Engine(recipe.with_layout(ParallelConfig(tensor_model_parallel_size=2)))


@pytest.mark.parametrize(
    "wrong", [{"chunk_tokens": 0}, {"page_tokens": 3}, {"max_running": 0}, {"cache_dtype": "int4"}]
)
def test_wrong_options_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineOptions(**wrong)
