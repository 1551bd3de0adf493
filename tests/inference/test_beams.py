"""Beam search finds what transformers finds, and with enough beams what trying everything finds."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_vita.errors import LogitsError
from megatron_vita.inference.generation.beams import BeamHypothesis, BeamSearch
from megatron_vita.inference.requests.types import SamplingParams
from tests.scale import scaled

PROMPT = [5, 9, 3, 17]
VOCAB = 24


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.6, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def search(
    model: LlamaForCausalLM, sampling: SamplingParams, *, end_ids: frozenset[int]
) -> BeamSearch:
    """Run the search as an engine does, without a cache."""
    beams = BeamSearch(sampling, end_ids=end_ids)
    rows = [PROMPT]
    while not beams.done:
        beams.advance(model(torch.tensor(rows)).logits[:, -1])
        rows = [
            [*rows[parent], token]
            for parent, token in zip(beams.parents, beams.tokens, strict=True)
        ]
    return beams


def logprobs_of(model: LlamaForCausalLM, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logprobs = model(torch.tensor([[*PROMPT, *tokens]])).logits[0].log_softmax(-1)
    return logprobs[len(PROMPT) - 1 : -1]


@pytest.mark.parametrize("ends", [[2], [2, 7], [2, 7, 11, 13], []])
@pytest.mark.parametrize(("beams", "count"), [(2, 1), (4, 4), (7, 3)])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
def test_answers_and_scores_are_those_of_transformers(
    ends: list[int], beams: int, count: int, length_penalty: float
) -> None:
    for seed in range(scaled(1, full=3)):
        model = tiny_llama(seed)
        expected = model.generate(
            torch.tensor([PROMPT]), num_beams=beams, num_return_sequences=count, length_penalty=length_penalty,
            max_new_tokens=10, eos_token_id=ends or None, do_sample=False, return_dict_in_generate=True,
            output_scores=True, pad_token_id=0,
        )  # fmt: skip
        sampling = SamplingParams(
            num_beams=beams, n=count, length_penalty=length_penalty, max_new_tokens=10
        )
        found = search(model, sampling, end_ids=frozenset(ends)).results(count)
        assert len(found) == count
        for answer, sequence, score in zip(
            found, expected.sequences, expected.sequences_scores, strict=True
        ):
            tokens = sequence[len(PROMPT) :].tolist()
            until = next(
                (place for place, token in enumerate(tokens) if token in ends), len(tokens)
            )
            assert answer.token_ids == tokens[:until]
            assert answer.score == pytest.approx(score.item(), rel=1e-5)
            assert answer.finish == ("stop" if until < len(tokens) else "length")


def test_the_answers_of_these_models_end_both_ways_and_at_several_lengths() -> None:
    """Otherwise the comparison would prove little."""
    sampling = SamplingParams(num_beams=4, n=4, max_new_tokens=10)
    found = [
        a
        for seed in range(3)
        for a in search(tiny_llama(seed), sampling, end_ids=frozenset([2, 7])).results(4)
    ]
    assert {answer.finish for answer in found} == {"stop", "length"}
    assert len({len(answer.tokens) for answer in found}) >= 3


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_enough_beams_find_what_trying_everything_finds(length_penalty: float) -> None:
    model = tiny_llama(3)
    vocabulary = range(8)
    end = 4
    length = 3
    model.lm_head.weight.data = model.lm_head.weight.data[: len(vocabulary)]
    best = []
    for tokens in itertools.product(vocabulary, repeat=length):
        until = tokens.index(end) + 1 if end in tokens else length
        if all(token == 0 for token in tokens[until:]):  # each answer once
            best.append(tokens[:until])
    table = {}
    for first in itertools.product(vocabulary, repeat=length - 1):
        table[first] = logprobs_of(model, [*first, 0])
    scores = []
    for tokens in best:
        rows = table[(*tokens[: length - 1], *[0] * (length - 1 - len(tokens)))]
        total = sum(rows[place, token].item() for place, token in enumerate(tokens))
        scores.append((total / len(tokens) ** length_penalty, tokens))
    scores.sort(reverse=True)
    sampling = SamplingParams(
        num_beams=64, n=20, length_penalty=length_penalty, max_new_tokens=length
    )
    found = search(model, sampling, end_ids=frozenset([end])).results(20)
    for answer, (score, tokens) in zip(found, scores[:20], strict=True):
        assert answer.token_ids == [token for token in tokens if token != end]
        assert answer.score == pytest.approx(score, abs=1e-5)


def test_answers_bring_the_models_logprobs() -> None:
    model = tiny_llama(0)
    sampling = SamplingParams(num_beams=3, n=3, max_new_tokens=6, logprobs=2)
    for answer in search(model, sampling, end_ids=frozenset([2])).results(3):
        expected = logprobs_of(model, answer.token_ids)
        for row, token in zip(expected, answer.tokens, strict=True):
            assert token.chosen.logprob == pytest.approx(
                row[token.chosen.token_id].item(), abs=1e-5
            )
            values, ids = row.topk(2)
            assert [one.token_id for one in token.likeliest] == ids.tolist()
            assert [one.logprob for one in token.likeliest] == pytest.approx(
                values.tolist(), abs=1e-5
            )


def test_a_search_that_ignores_ends_goes_to_the_last_token() -> None:
    sampling = SamplingParams(num_beams=3, n=3, max_new_tokens=5, ignore_eos=True)
    found = search(tiny_llama(0), sampling, end_ids=frozenset(range(VOCAB))).results(3)
    assert [(len(answer.tokens), answer.finish) for answer in found] == [(5, "length")] * 3


def test_a_vocabulary_smaller_than_the_beams_is_tried_whole() -> None:
    """Two tokens, the second of which ends: the answers are of none, one and two tokens, and the
    one cut at two."""
    beams = BeamSearch(SamplingParams(num_beams=8, n=8, max_new_tokens=3), end_ids=frozenset([1]))
    while not beams.done:
        beams.advance(torch.tensor([[0.5, 0.5]]).log().expand(max(1, len(beams.tokens)), -1))
    found = beams.results(8)
    assert sorted((len(answer.tokens), answer.finish) for answer in found) == [
        (0, "stop"),
        (1, "stop"),
        (2, "stop"),
        (3, "length"),
    ]


def test_when_every_beam_ends_at_once_the_search_is_done() -> None:
    """A token of no probability goes on with nothing."""
    beams = BeamSearch(
        SamplingParams(num_beams=3, n=2, max_new_tokens=9), end_ids=frozenset([0, 1])
    )
    beams.advance(torch.tensor([[1.0, 2.0, -math.inf]]))
    assert beams.done
    assert [answer.token_ids for answer in beams.results(2)] == [[], []]


def test_beams_go_on_however_many_kinds_of_end_are_likelier() -> None:
    beams = BeamSearch(
        SamplingParams(num_beams=2, n=1, max_new_tokens=9), end_ids=frozenset([0, 1, 2, 3])
    )
    beams.advance(torch.tensor([[5.0, 5.0, 5.0, 5.0, 3.0, 2.0, 1.0]]))
    assert beams.tokens == [4, 5]


def test_equal_candidates_are_taken_by_row_and_id() -> None:
    beams = BeamSearch(SamplingParams(num_beams=3, n=1, max_new_tokens=9), end_ids=frozenset())
    beams.advance(torch.zeros(1, 40))
    assert (beams.parents, beams.tokens) == ([0, 0, 0], [0, 1, 2])
    beams.advance(torch.zeros(3, 40))
    assert (beams.parents, beams.tokens) == ([0, 0, 0], [0, 1, 2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    beams = BeamSearch(
        SamplingParams(num_beams=2, max_new_tokens=9, logprobs=2), end_ids=frozenset([1])
    )
    beams.advance(torch.tensor([[0.0, 0.1, 0.2, 0.3]]))
    with pytest.raises(LogitsError, match=f"{bad} in 1 of 2") as caught:
        beams.advance(torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.0, bad, 0.2, 0.3]]))
    assert caught.value.rows == [1]


def test_results_are_no_more_than_asked_for_best_first() -> None:
    beams = search(
        tiny_llama(1), SamplingParams(num_beams=4, n=2, max_new_tokens=6), end_ids=frozenset([2])
    )
    found: list[BeamHypothesis] = beams.results(2)
    assert len(found) == 2
    assert found[0].score >= found[1].score
