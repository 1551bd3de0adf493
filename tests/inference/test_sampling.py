"""Draws: the distributions of transformers' processors, by numbers that a seed alone decides."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_vita.errors import LogitsError, VitaError
from megatron_vita.inference.generation import sampling as sampling_module
from megatron_vita.inference.generation.sampling import (
    Penalties,
    SamplingRow,
    has_penalties,
    likeliest_tokens,
    log_probabilities,
    process_logits,
    sample_tokens,
    uniform_number,
)
from megatron_vita.inference.requests.types import SamplingParams

VOCAB = 50


def random_logits(rows: int, seed: int = 0, *, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def draw(step: int = 0, *, choice: int = 0, **options: Any) -> SamplingRow:
    return SamplingRow(sampling=SamplingParams(**options), choice=choice, step=step)


def draw_with_penalties(prompt: list[int], answer: list[int], **options: Any) -> SamplingRow:
    sampling = SamplingParams(**options)
    penalties = Penalties(torch.tensor(prompt, dtype=torch.int64), vocab_size=VOCAB, device="cpu")
    for token in answer:
        penalties.add(token)
    return SamplingRow(sampling=sampling, step=len(answer), penalties=penalties)


def ids(logits: Tensor, draws: list[SamplingRow]) -> list[int]:
    return [token.chosen.token_id for token in sample_tokens(logits, draws)]


def warpers(sampling: SamplingParams) -> LogitsProcessorList:
    """transformers' own, in its order."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 500, "top_p": 0.999},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.2, "repetition_penalty": 1.4},
        {"temperature": 0.9, "repetition_penalty": 0.8, "top_k": 9, "top_p": 0.9},
    ],
)
def test_distributions_are_those_of_transformers(options: dict[str, Any]) -> None:
    logits = random_logits(6)
    context = torch.randint(VOCAB, (6, 12), generator=torch.Generator().manual_seed(1))
    draws = [draw_with_penalties(row[:8].tolist(), row[8:].tolist(), **options) for row in context]
    expected = warpers(draws[0].sampling)(context, logits.clone())
    found = process_logits(logits, draws)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_rows_of_a_mixed_batch_have_the_distributions_they_have_alone() -> None:
    draws = [
        draw(temperature=0.7, top_k=3),
        draw(),
        draw_with_penalties([1, 2], [3], temperature=1.5, frequency_penalty=1.0),
        draw(temperature=1.1),
        draw_with_penalties([4, 5], [6], repetition_penalty=2.0),
        draw(temperature=2.0, top_p=0.5),
        draw(temperature=2.0, top_k=30, top_p=0.9),
    ]
    logits = random_logits(len(draws))
    together = process_logits(logits, draws)
    for row, one in enumerate(draws):
        assert torch.equal(together[row], process_logits(logits[row : row + 1], [one])[0])


def test_presence_and_frequency_penalties_take_from_tokens_of_the_answer_alone() -> None:
    logits = random_logits(1)
    one = draw_with_penalties(
        [1, 1, 2], [3, 4, 4], temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    expected = logits.clone()
    expected[0, 3] -= 0.5 + 0.25
    expected[0, 4] -= 0.5 + 2 * 0.25
    torch.testing.assert_close(
        process_logits(logits, [one]).log_softmax(-1), expected.log_softmax(-1)
    )


def test_greedy_takes_the_likeliest_after_penalties() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 3.0
    logits[:, 9] = 2.0
    assert ids(logits, [draw(), draw_with_penalties([7], [], repetition_penalty=2.0)]) == [7, 9]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_k": 5}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": -1.0}, True),
        ({"frequency_penalty": 0.1}, True),
    ],
)
def test_only_samplings_with_penalties_need_the_tokens_before(
    options: dict[str, Any], wanted: bool
) -> None:
    assert has_penalties(SamplingParams(**options)) is wanted


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_equal_ones(top_k: int) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 30] = 1.0
    kept = (
        process_logits(logits, [draw(temperature=1.0, top_k=top_k)])[0]
        .isfinite()
        .nonzero()
        .flatten()
        .tolist()
    )
    assert kept == [*range(top_k - 1), 30]


def test_top_p_keeps_the_smallest_set_and_the_lowest_ids_of_equal_ones() -> None:
    logits = torch.tensor([[0.125, 0.25, 0.125, 0.25, 0.25]]).log()
    for top_p, kept in [
        (0.01, [1]),
        (0.25, [1]),
        (0.26, [1, 3]),
        (0.74, [1, 3, 4]),
        (0.76, [0, 1, 3, 4]),
    ]:
        found = process_logits(logits, [draw(temperature=1.0, top_p=top_p)])[0]
        assert found.isfinite().nonzero().flatten().tolist() == kept, top_p


def test_top_p_of_one_loses_no_token_to_rounding() -> None:
    logits = random_logits(2, vocab=100_000)
    draws = [draw(temperature=1.0, top_k=99_999), draw(temperature=1.0, top_p=0.5)]
    assert process_logits(logits, draws)[0].isfinite().sum() == 99_999


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 6, "top_p": 0.9}]
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Pearson's chi-square of 20,000 draws stays below its 99.99 % quantile."""
    logits = random_logits(1, vocab=12)
    sampling = SamplingParams(seed=5, **options)
    draws = [SamplingRow(sampling=sampling, choice=i % 4, step=i // 4) for i in range(20_000)]
    counts = np.bincount(ids(logits.expand(len(draws), -1), draws), minlength=12)
    exact = process_logits(logits, draws[:1])[0].softmax(-1).double().numpy()
    assert counts[exact == 0].sum() == 0
    expected = exact[exact > 0] * len(draws)
    statistic = ((counts[exact > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    # Wilson and Hilferty 1931
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < quantile


def test_the_same_seed_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = random_logits(40)
    draws = [draw(step=i, temperature=1.0 + i / 20, top_k=i, seed=9) for i in range(40)]
    alone = [ids(logits[i : i + 1], [draws[i]])[0] for i in range(40)]
    assert ids(logits, draws) == alone
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [draws[i] if i % 3 else draw() for i in order]
    for place, i in enumerate(order):
        if i % 3:
            assert ids(logits[order], mixed)[place] == alone[i]


def test_seeds_choices_and_steps_have_numbers_of_their_own() -> None:
    numbers = [
        uniform_number(seed, choice=choice, step=step)
        for seed in (0, 1, 2**63 - 1)
        for choice in range(8)
        for step in range(50)
    ]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(np.mean(numbers) - 0.5) < 4 / math.sqrt(12 * len(numbers))


def test_the_numbers_of_a_seed_stay_what_they_were() -> None:
    assert uniform_number(5, choice=3, step=7) == 2224013184805380 * 2.0**-52


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.25, 3), (0.5, 3), (1 - 2**-52, 3)])
def test_a_token_without_probability_is_never_drawn(
    number: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_module, "uniform_number", lambda seed, choice, step: number)
    logits = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).log()
    assert ids(logits, [draw(temperature=1.0)]) == [token]


def test_the_rounding_of_another_layout_changes_no_draw() -> None:
    """Two tokens are about equally likely; which of them is first changes with rounding."""
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, 10] = logits[0, 40] = 5.0
    other = logits.clone()
    other[0, 40] += 1e-6
    for step in range(50):
        for options in ({}, {"top_k": 2}, {"top_p": 0.99}):
            one = draw(step=step, temperature=1.0, **options)
            assert ids(logits, [one]) == ids(other, [one])


@pytest.mark.parametrize("shift", [0.0, 25.0, -1e4])
@pytest.mark.parametrize("certain", [0.0, 12.0])
def test_logprobs_of_a_large_vocabulary_are_exact(certain: float, shift: float) -> None:
    logits = random_logits(4, vocab=151_936) + shift
    logits[:, 7] += certain
    logits[1, 100:] = -math.inf
    expected = logits.double().log_softmax(dim=-1)
    torch.testing.assert_close(log_probabilities(logits).double(), expected, atol=1e-6, rtol=1e-6)


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(3).bfloat16()
    draws = [
        draw(temperature=2.0, top_k=3, logprobs=4, seed=3),
        draw(logprobs=0),
        draw_with_penalties([1], [2], repetition_penalty=5.0, logprobs=VOCAB // 3),
    ]
    expected = torch.log_softmax(logits.float(), dim=-1)
    for row, scored in enumerate(sample_tokens(logits, draws)):
        count = draws[row].sampling.logprobs
        values, order = expected[row].sort(descending=True, stable=True)
        assert [score.token_id for score in scored.likeliest] == order[:count].tolist()
        assert [score.logprob for score in scored.likeliest] == pytest.approx(
            values[:count].tolist(), abs=1e-6
        )
        assert scored.chosen.logprob == pytest.approx(
            expected[row, scored.chosen.token_id].item(), abs=1e-6
        )


def test_without_logprobs_there_are_none() -> None:
    without, with_them = sample_tokens(random_logits(2), [draw(), draw(logprobs=2)])
    assert math.isnan(without.chosen.logprob)
    assert without.likeliest == ()
    assert len(with_them.likeliest) == 2


def test_a_vocabulary_smaller_than_logprobs_is_given_whole() -> None:
    (scored,) = sample_tokens(random_logits(1, vocab=3), [draw(logprobs=20)])
    assert sorted(score.token_id for score in scored.likeliest) == [0, 1, 2]


def test_likeliest_tokens_are_those_of_a_stable_sort() -> None:
    rows = torch.randint(6, (20, 200), generator=torch.Generator().manual_seed(0)).float()
    rows[rows == 0] = -math.inf
    values, order = rows.sort(dim=-1, descending=True, stable=True)
    for count in (1, 7, 50, 200):
        found = likeliest_tokens(rows, count)
        assert torch.equal(found[0], values[:, :count])
        assert torch.equal(found[1], order[:, :count])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "top_k": 9, "logprobs": 3}],
)
def test_logits_that_are_no_numbers_are_refused_by_row(options: dict[str, Any], bad: float) -> None:
    logits = random_logits(4)
    logits[1, 3] = logits[3, 0] = bad
    draws = [
        draw(**options),
        draw_with_penalties([3], [4], repetition_penalty=1.5, **options),
        *[draw(**options)] * 2,
    ]
    with pytest.raises(LogitsError, match=rf"{bad} in 2 of 4 answers") as caught:
        sample_tokens(logits, draws)
    assert isinstance(caught.value, VitaError)
    assert caught.value.rows == [1, 3]
    assert len(sample_tokens(logits[[0, 2]], [draws[0], draws[2]])) == 2


def test_a_row_of_nothing_but_minus_infinity_is_refused() -> None:
    with pytest.raises(LogitsError, match="-inf in 1 of 1"):
        sample_tokens(torch.full((1, VOCAB), -math.inf), [draw(temperature=1.0)])


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    logits = random_logits(5) * 10
    assert ids(logits, [draw(temperature=temperature)] * 5) == logits.argmax(-1).tolist()


def test_logits_are_left_as_they_were() -> None:
    logits = random_logits(3)
    before = logits.clone()
    sample_tokens(
        logits,
        [
            draw(temperature=1.0, top_k=3),
            draw_with_penalties([1], [2], presence_penalty=1.0),
            draw(),
        ],
    )
    assert torch.equal(logits, before)


def test_no_rows_give_no_tokens() -> None:
    assert sample_tokens(torch.zeros(0, VOCAB), []) == []


def test_all_answers_of_a_request_are_drawn_apart() -> None:
    sampling = SamplingParams(temperature=2.0, n=4, seed=1)
    logits = random_logits(1).expand(4, -1)
    streams = [
        tuple(ids(logits, [SamplingRow(sampling=dataclasses.replace(sampling), choice=i, step=s) for i in range(4)])[c]
              for s in range(12))
        for c in range(4)
    ]  # fmt: skip
    assert len(set(streams)) == 4
