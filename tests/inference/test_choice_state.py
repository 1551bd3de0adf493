"""An answer ends once, for the right reason, and its pieces are the whole of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vita.inference.generation.beams import BeamHypothesis
from megatron_vita.inference.generation.choice_state import ChoiceState
from megatron_vita.inference.generation.sampling import sample_tokens
from megatron_vita.inference.requests.types import (
    OutputDelta,
    SamplingParams,
    ScoredToken,
    TokenScore,
)
from megatron_vita.text.tokenizer import load_tokenizer
from megatron_vita.text.tokenizer_base import Tokenizer
from megatron_vita.text.train import train_sentencepiece

TEXT = "the quick é fox"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path: Path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(
        ["the quick brown fox jumps over the lazy dog 0123456789"] * 20, path, vocab_size=320
    )
    return load_tokenizer(path)


def scored(token_id: int) -> ScoredToken:
    return ScoredToken(chosen=TokenScore(token_id, -1.0), likeliest=(TokenScore(token_id, -1.0),))


def answer(tokenizer: Tokenizer, **options: Any) -> ChoiceState:
    return ChoiceState(SamplingParams(**options), request=7, choice=2, tokenizer=tokenizer)


def take_all(state: ChoiceState, ids: list[int], tokenizer: Tokenizer) -> list[OutputDelta]:
    pieces = []
    for token in ids:
        pieces.append(
            state.append(scored(token), end_ids=frozenset([tokenizer.special_id("<|im_end|>")]))
        )
        if state.finish:
            break
    return pieces


def joined(pieces: list[OutputDelta]) -> tuple[str, list[int]]:
    return "".join(piece.text for piece in pieces), [
        token for piece in pieces for token in piece.token_ids
    ]


def test_an_end_token_stops_the_answer_and_is_no_part_of_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    state = answer(tokenizer)
    pieces = take_all(state, [*ids, tokenizer.special_id("<|im_end|>"), *ids], tokenizer)
    assert joined(pieces) == (TEXT, ids)
    assert [piece.finish for piece in pieces] == [None] * len(ids) + ["stop"]
    assert {(piece.request, piece.choice) for piece in pieces} == {(7, 2)}
    assert (state.finish, state.ids) == ("stop", ids)


def test_the_most_tokens_end_the_answer_with_what_waited(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    cut = len(tokenizer.encode("the quick ")) + 1
    pieces = take_all(answer(tokenizer, max_new_tokens=cut), ids, tokenizer)
    assert joined(pieces) == ("the quick \ufffd", ids[:cut])
    assert pieces[-1].finish == "length"


def test_an_ignored_end_goes_on_to_the_most_tokens(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the"), tokenizer.special_id("<|im_end|>"), *tokenizer.encode("fox")]
    pieces = take_all(answer(tokenizer, max_new_tokens=len(ids), ignore_eos=True), ids, tokenizer)
    assert joined(pieces) == ("thefox", ids)
    assert pieces[-1].finish == "length"


def test_a_stop_string_ends_the_answer_before_it(tokenizer: Tokenizer) -> None:
    pieces = take_all(answer(tokenizer, stop=("ick", "fox")), tokenizer.encode(TEXT), tokenizer)
    assert joined(pieces)[0] == "the qu"
    assert pieces[-1].finish == "stop"


def test_a_stop_string_seen_only_when_the_length_ends_the_answer_is_a_stop(
    tokenizer: Tokenizer,
) -> None:
    """Half a character waits, and turns out to be what the stop string is."""
    half = tokenizer.encode("é")[:1]
    pieces = take_all(answer(tokenizer, stop=("\ufffd",), max_new_tokens=1), half, tokenizer)
    assert (joined(pieces)[0], pieces[-1].finish) == ("", "stop")


@pytest.mark.parametrize(
    ("how", "finish"),
    [
        ("stop_at_length", "length"),
        ("cancel", "cancelled"),
        ("fail", "error"),
        ("fail", "model_error"),
    ],
)
def test_an_answer_ended_from_outside_gives_the_text_that_waited(
    tokenizer: Tokenizer, how: str, finish: Any
) -> None:
    state = answer(tokenizer, stop=("the end",))
    (piece,) = take_all(state, tokenizer.encode("the"), tokenizer)
    assert piece.text == ""
    last = state.fail("too hot", finish=finish) if how == "fail" else getattr(state, how)()
    assert (last.text, last.token_ids, last.finish) == ("the", (), finish)
    assert last.error == ("too hot" if how == "fail" else "")
    assert state.finish == finish


def test_an_answer_ends_once(tokenizer: Tokenizer) -> None:
    state = answer(tokenizer)
    state.cancel()
    for again in (
        state.cancel,
        state.stop_at_length,
        lambda: state.append(scored(30), end_ids=frozenset()),
    ):
        with pytest.raises(AssertionError):
            again()


@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_scores_come_where_they_were_asked_for(tokenizer: Tokenizer, logprobs: int | None) -> None:
    state = answer(tokenizer, logprobs=logprobs)
    piece = state.append(scored(30), end_ids=frozenset())
    assert piece.scores == (() if logprobs is None else (scored(30),))
    assert state.cancel().scores == ()


def test_draws_count_steps_and_know_what_came_before(tokenizer: Tokenizer) -> None:
    """The likeliest token is the prompt's, the second likeliest the answer's, the third free of
    penalties."""
    logits = torch.zeros(1, tokenizer.vocab_size)
    logits[0, 30:33] = torch.tensor([3.0, 2.0, 1.9])
    state = answer(tokenizer, repetition_penalty=2.0)
    state.set_prompt(torch.tensor([30, 30, 5]), vocab_size=tokenizer.vocab_size, device="cpu")
    for step, expected in enumerate([31, 32, 30]):
        draw = state.sampling_row()
        assert (draw.step, draw.choice, draw.sampling) == (step, 2, state.sampling)
        (token,) = sample_tokens(logits, [draw])
        assert token.chosen.token_id == expected
        state.append(token, end_ids=frozenset())


def test_without_penalties_nothing_is_kept_of_the_prompt(tokenizer: Tokenizer) -> None:
    state = answer(tokenizer)
    state.set_prompt(torch.tensor([30]), vocab_size=tokenizer.vocab_size, device="cpu")
    assert state.sampling_row().penalties is None


@pytest.mark.parametrize(
    ("stop", "text", "finish"), [((), TEXT, "length"), (("qu", "zz"), "the ", "stop")]
)
def test_an_answer_of_beam_search_is_one_piece(
    tokenizer: Tokenizer, stop: tuple[str, ...], text: str, finish: str
) -> None:
    tokens = tuple(scored(token) for token in tokenizer.encode(TEXT))
    found = BeamHypothesis(tokens=tokens, score=-1.0, finish="length")
    state = answer(tokenizer, stop=stop, logprobs=1)
    piece = state.append_beam(found)
    assert (piece.text, piece.finish) == (text, finish)
    assert (
        piece.token_ids
        == tuple(token.chosen.token_id for token in piece.scores)
        == tuple(state.ids)
    )
    assert (tokenizer.decode(piece.token_ids) == TEXT) == (finish == "length")
