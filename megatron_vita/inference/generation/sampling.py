"""From logits to the next token of each answer.

A draw depends on its row's logits, its options and (seed, choice, step) alone: not on the rest of
the batch, the device or the layout. Tokens keep the order of their ids under the cumulative
distribution, so that the rounding of another layout, which may swap two tokens of nearly equal
probability in an order by probability, moves no more than borders.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vita.errors import LogitsError
from megatron_vita.inference.requests import SamplingParams, ScoredToken, TokenScore

_SMALLEST = torch.finfo(torch.float32).tiny


class Penalties:
    """Which tokens a prompt has and how often its answer has each, on the device of the logits."""

    def __init__(self, prompt_ids: Tensor, *, vocab_size: int, device: torch.device | str) -> None:
        """`vocab_size` is the width of the logits; prompt_ids [t] int64 on the CPU."""
        self.in_prompt = (
            torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, prompt_ids, True).to(device)
        )
        self.counts = torch.zeros(vocab_size, device=device)

    def add(self, token_id: int) -> None:
        """The answer got this token."""
        self.counts[token_id] += 1


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What one row of logits is drawn by."""

    sampling: SamplingParams
    choice: int = 0  # which of the request's n answers
    step: int  # tokens that the answer has
    penalties: Penalties | None = None  # where the sampling has any


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether a draw must know which tokens came before."""
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (
        1,
        0,
        0,
    )


def draw_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[ScoredToken]:
    """The next token of each row of logits [B, V].

    Where `logprobs` is None, `likeliest` is empty and `logprob` NaN. The device is waited for once.
    Raises LogitsError, which names the rows, where logits are NaN or infinite; the other rows can
    be drawn again without them.
    """
    assert len(logits) == len(draws)
    if not draws:
        return []
    peaks, tokens = logits.max(dim=-1)  # of equal ones the first; NaN where a row has any
    if shaped := [
        i
        for i, draw in enumerate(draws)
        if draw.sampling.temperature > 0 or draw.penalties is not None
    ]:
        rows = upload(shaped, like=tokens)
        tokens[rows] = _shaped_tokens(logits[rows].float(), [draws[i] for i in shaped])
    parts = [peaks.double(), tokens.double()]
    scored = [i for i, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    width = min(max((draws[i].sampling.logprobs or 0 for i in scored), default=0), logits.shape[-1])
    if scored:
        rows = upload(scored, like=tokens)
        parts.append(_scores(logits[rows].float(), tokens[rows], width=width).flatten())
    values = torch.cat(parts).tolist()
    refuse_unless_finite(values[: len(draws)])
    found = [
        ScoredToken(chosen=TokenScore(int(token), math.nan))
        for token in values[len(draws) : 2 * len(draws)]
    ]
    for place, i in enumerate(scored):
        row = values[2 * len(draws) + place * (1 + 2 * width) :][: 1 + 2 * width]
        likeliest = tuple(map(TokenScore, map(int, row[1 : 1 + width]), row[1 + width :]))
        chosen = TokenScore(found[i].chosen.token_id, row[0])
        found[i] = ScoredToken(chosen=chosen, likeliest=likeliest[: draws[i].sampling.logprobs])
    return found


def likeliest_tokens(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids [R, count] of the highest of rows [R, V], best first, the lower id first among
    equal ones.

    `torch.topk` leaves open which of equal values it takes, and a stable sort of everything takes
    long.
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
    """Raises LogitsError where the highest logit of a row is NaN or infinite."""
    if wrong := [row for row, peak in enumerate(peaks) if not math.isfinite(peak)]:
        raise LogitsError(
            f"the model's highest logit is {peaks[wrong[0]]} in {len(wrong)} of {len(peaks)} answers, where it must be "
            "finite: its weights are damaged, or its numbers overflow",
            rows=wrong,
        )


def uniform_number(seed: int, *, choice: int, step: int) -> float:
    """A multiple of 2**-52 in [0, 1) that these three decide (Philox, Salmon et al. 2011, in
    counter mode)."""
    generator = np.random.Philox(
        key=np.array([seed, choice], np.uint64), counter=np.array([step, 0, 0, 0], np.uint64)
    )
    return (int(generator.random_raw()) >> 12) * 2.0**-52


def candidate_logits(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """What is drawn from: fp32 logits [R, V] after penalties, temperature, top-k and top-p, -inf
    for what is left out.

    Rows of temperature 0 keep temperature 1 and all tokens.
    """
    if penalised := [i for i, draw in enumerate(draws) if draw.penalties is not None]:
        rows = upload(penalised, like=logits, dtype=torch.int64)
        logits = logits.index_copy(0, rows, _penalise(logits[rows], [draws[i] for i in penalised]))
    if warm := [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]:
        rows = upload(warm, like=logits, dtype=torch.int64)
        # the highest is 0: division cannot overflow
        scaled = logits[rows] - logits[rows].amax(dim=-1, keepdim=True)
        scaled = scaled / _column(
            [max(draws[i].sampling.temperature, _SMALLEST) for i in warm], scaled
        )
        logits = logits.index_copy(0, rows, _cut(scaled, [draws[i].sampling for i in warm]))
    return logits


def _shaped_tokens(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Tokens [R] of rows [R, V] that are not just their likeliest."""
    logits = candidate_logits(logits, draws)
    tokens = logits.argmax(dim=-1)
    if warm := [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0]:
        rows = upload(warm, like=tokens)
        # In double precision: the rounding of exponentials and of their sum would depend on the
        # device.
        cumulative = logits[rows].double().softmax(dim=-1).cumsum(dim=-1)
        numbers = [
            uniform_number(draws[i].sampling.seed, choice=draws[i].choice, step=draws[i].step)
            for i in warm
        ]
        targets = cumulative[:, -1:] * _column(numbers, cumulative)
        found = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
        # NaN finds no place; its row is refused later
        tokens[rows] = found.clamp(max=logits.shape[-1] - 1)
    return tokens


def _penalise(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits [R, V] of draws that all have penalties."""
    penalties = [penalty for draw in draws if (penalty := draw.penalties) is not None]
    counts = torch.stack([penalty.counts for penalty in penalties])
    present = counts > 0
    seen = torch.stack([penalty.in_prompt for penalty in penalties]) | present
    repetition = _column([draw.sampling.repetition_penalty for draw in draws], logits)
    logits = torch.where(
        seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits
    )
    logits = logits - _column([draw.sampling.presence_penalty for draw in draws], logits) * present
    return logits - _column([draw.sampling.frequency_penalty for draw in draws], logits) * counts


def _cut(logits: Tensor, options: Sequence[SamplingParams]) -> Tensor:
    """Logits [R, V] with -inf outside of the top-k, and of these of the smallest likeliest set that
    reaches top-p."""
    vocab_size = logits.shape[-1]
    top_k = [min(option.top_k or vocab_size, vocab_size) for option in options]
    cut = [i for i, option in enumerate(options) if top_k[i] < vocab_size or option.top_p < 1]
    if not cut:
        return logits
    rows = upload(cut, like=logits, dtype=torch.int64)
    whole, width = logits[rows], max(top_k[i] for i in cut)
    ordered = (
        whole.topk(width).values
        if width < vocab_size
        else whole.sort(dim=-1, descending=True).values
    )
    limits = upload([top_k[i] for i in cut], like=rows).unsqueeze(1)
    ordered = ordered.masked_fill(torch.arange(width, device=rows.device) >= limits, -math.inf)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # Rounded sums can reach 1 early, so that for top-p 1 the border is beyond all sums.
    border = _column([options[i].top_p if options[i].top_p < 1 else 2 for i in cut], before)
    # NaN is below nothing
    counts = (before < border).sum(dim=-1, keepdim=True).clamp(min=1).minimum(limits)
    kept = _highest(whole, ordered.gather(1, counts - 1), counts)
    return logits.index_copy(0, rows, whole.masked_fill(~kept, -math.inf))


def _highest(rows: Tensor, thresholds: Tensor, counts: Tensor) -> Tensor:
    """A mask of the `counts` [R, 1] highest of rows [R, V]; the lowest of them are `thresholds` [R,
    1]."""
    above, equal = rows > thresholds, rows == thresholds
    return above | (equal & (equal.cumsum(dim=-1) <= counts - above.sum(dim=-1, keepdim=True)))


def _scores(logits: Tensor, tokens: Tensor, *, width: int) -> Tensor:
    """Log-probabilities of `tokens` [R], then ids, then log-probabilities of the likeliest: [R, 1 +
    2 * width]."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).double()
    if width == 0:
        return chosen
    values, ids = likeliest_tokens(logprobs, width)
    return torch.cat([chosen, ids.double(), values.double()], dim=1)


def upload(values: Sequence[float], *, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers as a tensor on the device of `like`, of its type unless told, without waiting for the
    device."""
    pinned = like.device.type == "cuda"  # from other memory a copy waits
    tensor = torch.tensor(values, dtype=dtype or like.dtype, pin_memory=pinned)
    return tensor.to(like.device, non_blocking=True)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, like=like).unsqueeze(1)
