"""Sampling: from logits to the next token of each answer.

A sampled token depends on its row's logits, its parameters and (seed, choice, step) alone: not on
the rest of the batch, the device or the layout. The cumulative distribution is taken in the order
of token ids, not of probabilities: another layout's rounding may swap two tokens of nearly equal
probability, which in this order moves borders only by as much as it changes probabilities.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vita.errors import LogitsError
from megatron_vita.inference.requests.types import SamplingParams, ScoredToken, TokenScore

_SMALLEST = torch.finfo(torch.float32).tiny


class Penalties:
    """Tokens of a prompt, and token counts of its answer, on the device of the logits."""

    def __init__(self, prompt_ids: Tensor, *, vocab_size: int, device: torch.device | str) -> None:
        """`vocab_size` is the width of the logits; prompt_ids [t] int64 on the CPU."""
        self.in_prompt = (
            torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, prompt_ids, True).to(device)
        )
        self.counts = torch.zeros(vocab_size, device=device)

    def add(self, token_id: int) -> None:
        """Count a token of the answer."""
        self.counts[token_id] += 1


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """Parameters by which one row of logits is sampled."""

    sampling: SamplingParams
    choice: int = 0  # which of the request's n answers
    step: int  # tokens that the answer has
    penalties: Penalties | None = None  # where the sampling has any


def has_penalties(sampling: SamplingParams) -> bool:
    """True if sampling depends on the preceding tokens."""
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (
        1,
        0,
        0,
    )


def sample_tokens(logits: Tensor, params: Sequence[SamplingRow]) -> list[ScoredToken]:
    """Sample the next token of each row of logits [B, V], with one wait for the device.

    Where `logprobs` is None, `likeliest` is empty and `logprob` NaN.

    Raises:
        LogitsError: logits of the rows that it names are NaN or infinite; the others can be sampled
            again without them.
    """
    assert len(logits) == len(params)
    if not params:
        return []
    # Greedy tokens of all rows at once; those that are sampled are replaced below.
    peaks, tokens = logits.max(dim=-1)  # of equal ones the first; NaN where a row has any
    if shaped := [
        i
        for i, row_params in enumerate(params)
        if row_params.sampling.temperature > 0 or row_params.penalties is not None
    ]:
        rows = upload(shaped, like=tokens)
        tokens[rows] = _shaped_tokens(logits[rows].float(), [params[i] for i in shaped])
    # Everything goes to the host in one transfer; fp64 holds token ids exactly.
    parts = [peaks.double(), tokens.double()]
    scored = [i for i, row_params in enumerate(params) if row_params.sampling.logprobs is not None]
    width = min(
        max((params[i].sampling.logprobs or 0 for i in scored), default=0), logits.shape[-1]
    )
    if scored:
        rows = upload(scored, like=tokens)
        parts.append(_scores(logits[rows].float(), tokens[rows], width=width).flatten())
    values = torch.cat(parts).tolist()
    refuse_unless_finite(values[: len(params)])
    found = [
        ScoredToken(chosen=TokenScore(int(token), math.nan))
        for token in values[len(params) : 2 * len(params)]
    ]
    for place, i in enumerate(scored):
        row = values[2 * len(params) + place * (1 + 2 * width) :][: 1 + 2 * width]
        likeliest = tuple(map(TokenScore, map(int, row[1 : 1 + width]), row[1 + width :]))
        chosen = TokenScore(found[i].chosen.token_id, row[0])
        found[i] = ScoredToken(chosen=chosen, likeliest=likeliest[: params[i].sampling.logprobs])
    return found


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities [R, V] of logits [R, V], in fp32 and exact to 1e-6."""
    # log_softmax adds up a row's exponentials one after another on the CPU, which is off by 1e-5
    # at 50,000 tokens; sum() adds pairwise.
    below_best = logits.float() - logits.amax(dim=-1, keepdim=True)
    return below_best - below_best.exp().sum(dim=-1, keepdim=True).log()


def likeliest_tokens(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Top-k of rows [R, V] with ties broken by the lower id: values and ids [R, count], best first.

    `torch.topk` leaves open which of equal values it takes, and a stable sort of whole rows is
    slow.
    """
    kept = _highest(
        rows, rows.topk(count).values[:, -1:], torch.full((len(rows), 1), count, device=rows.device)
    )
    places = torch.arange(rows.shape[-1], device=rows.device)
    ids = (
        torch.where(kept, places, rows.shape[-1])
        .topk(count, largest=False)
        .values.clamp(max=rows.shape[-1] - 1)
    )
    values, order = rows.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def refuse_unless_finite(peaks: Sequence[float]) -> None:
    """Raise LogitsError if the highest logit of a row is NaN or infinite."""
    if wrong := [row for row, peak in enumerate(peaks) if not math.isfinite(peak)]:
        raise LogitsError(
            f"the model's highest logit is {peaks[wrong[0]]} in {len(wrong)} of {len(peaks)} answers, where it must be "
            "finite: its weights are damaged, or its numbers overflow",
            rows=wrong,
        )


def uniform_number(seed: int, *, choice: int, step: int) -> float:
    """A number in [0, 1), a multiple of 2**-52, from a counter-based generator (Philox, Salmon et
    al. 2011)."""
    # The counter makes each number a function of (seed, choice, step): batches may change in
    # between.
    generator = np.random.Philox(
        key=np.array([seed, choice], np.uint64), counter=np.array([step, 0, 0, 0], np.uint64)
    )
    return (int(generator.random_raw()) >> 12) * 2.0**-52


def process_logits(logits: Tensor, params: Sequence[SamplingRow]) -> Tensor:
    """Apply penalties, temperature, top-k and top-p to fp32 logits [R, V]; excluded tokens become
    -inf.

    Rows of temperature 0 keep temperature 1 and all tokens.
    """
    if with_penalties := [
        i for i, row_params in enumerate(params) if row_params.penalties is not None
    ]:
        rows = upload(with_penalties, like=logits, dtype=torch.int64)
        logits = logits.index_copy(
            0, rows, _apply_penalties(logits[rows], [params[i] for i in with_penalties])
        )
    if warm := [i for i, row_params in enumerate(params) if row_params.sampling.temperature > 0]:
        rows = upload(warm, like=logits, dtype=torch.int64)
        # the highest is 0: division cannot overflow
        scaled = logits[rows] - logits[rows].amax(dim=-1, keepdim=True)
        scaled = scaled / _column(
            [max(params[i].sampling.temperature, _SMALLEST) for i in warm], scaled
        )
        logits = logits.index_copy(
            0, rows, _apply_top_k_top_p(scaled, [params[i].sampling for i in warm])
        )
    return logits


def _shaped_tokens(logits: Tensor, params: Sequence[SamplingRow]) -> Tensor:
    """Tokens [R] of rows [R, V] that have a temperature or penalties."""
    logits = process_logits(logits, params)
    tokens = logits.argmax(dim=-1)
    if warm := [i for i, row_params in enumerate(params) if row_params.sampling.temperature > 0]:
        rows = upload(warm, like=tokens)
        # In double precision: the rounding of exponentials and of their sum would depend on the
        # device.
        cumulative = logits[rows].double().softmax(dim=-1).cumsum(dim=-1)
        numbers = [
            uniform_number(params[i].sampling.seed, choice=params[i].choice, step=params[i].step)
            for i in warm
        ]
        targets = cumulative[:, -1:] * _column(numbers, cumulative)
        found = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
        # NaN finds no place; its row is refused later
        tokens[rows] = found.clamp(max=logits.shape[-1] - 1)
    return tokens


def _apply_penalties(logits: Tensor, params: Sequence[SamplingRow]) -> Tensor:
    """Apply penalties to logits [R, V], whose rows all have some."""
    penalties = [penalty for row_params in params if (penalty := row_params.penalties) is not None]
    counts = torch.stack([penalty.counts for penalty in penalties])
    present = counts > 0
    seen = torch.stack([penalty.in_prompt for penalty in penalties]) | present
    repetition = _column([row_params.sampling.repetition_penalty for row_params in params], logits)
    logits = torch.where(
        seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits
    )
    logits = (
        logits
        - _column([row_params.sampling.presence_penalty for row_params in params], logits) * present
    )
    return (
        logits
        - _column([row_params.sampling.frequency_penalty for row_params in params], logits) * counts
    )


def _apply_top_k_top_p(logits: Tensor, options: Sequence[SamplingParams]) -> Tensor:
    """Set logits [R, V] to -inf outside the top-k, and within these outside the smallest set of
    likeliest tokens whose probability reaches top-p."""
    vocab_size = logits.shape[-1]
    top_k = [min(option.top_k or vocab_size, vocab_size) for option in options]
    cut = [i for i, option in enumerate(options) if top_k[i] < vocab_size or option.top_p < 1]
    if not cut:
        return logits
    rows = upload(cut, like=logits, dtype=torch.int64)
    whole = logits[rows]
    width = max(top_k[i] for i in cut)
    if width < vocab_size:
        ordered = whole.topk(width).values
    else:
        ordered = whole.sort(dim=-1, descending=True).values
    limits = upload([top_k[i] for i in cut], like=rows).unsqueeze(1)
    ordered = ordered.masked_fill(torch.arange(width, device=rows.device) >= limits, -math.inf)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    border = _column([_top_p_border(options[i]) for i in cut], before)
    # NaN is below nothing
    counts = (before < border).sum(dim=-1, keepdim=True).clamp(min=1).minimum(limits)
    kept = _highest(whole, ordered.gather(1, counts - 1), counts)
    return logits.index_copy(0, rows, whole.masked_fill(~kept, -math.inf))


def _top_p_border(option: SamplingParams) -> float:
    if option.top_p < 1:
        return option.top_p
    # rounded sums can reach 1 early, so that for top-p 1 the border is beyond all sums
    return 2.0


def _highest(rows: Tensor, thresholds: Tensor, counts: Tensor) -> Tensor:
    """Mask of the `counts` [R, 1] highest values of rows [R, V], of which `thresholds` [R, 1] are
    the lowest. Among values equal to the threshold, lower ids are taken first."""
    above = rows > thresholds
    equal = rows == thresholds
    return above | (equal & (equal.cumsum(dim=-1) <= counts - above.sum(dim=-1, keepdim=True)))


def _scores(logits: Tensor, tokens: Tensor, *, width: int) -> Tensor:
    """Log-probabilities of `tokens` [R], then ids and log-probabilities of the likeliest tokens:
    [R, 1 + 2 * width]."""
    logprobs = log_probabilities(logits)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).double()
    if width == 0:
        return chosen
    values, ids = likeliest_tokens(logprobs, width)
    return torch.cat([chosen, ids.double(), values.double()], dim=1)


def upload(values: Sequence[float], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers to the device of `like` without waiting for it, as its type unless `dtype` is
    given."""
    pinned = like.device.type == "cuda"  # from other memory a copy waits
    tensor = torch.tensor(values, dtype=dtype or like.dtype, pin_memory=pinned)
    return tensor.to(like.device, non_blocking=True)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, like=like).unsqueeze(1)
