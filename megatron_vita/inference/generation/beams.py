"""Beam search of one request: takes log-probabilities, tells which beams continue with which
tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vita.inference.generation.sampling import (
    likeliest_tokens,
    log_probabilities,
    refuse_unless_finite,
    upload,
)
from megatron_vita.inference.requests.types import (
    FinishReason,
    SamplingParams,
    ScoredToken,
    TokenScore,
)


@dataclass(frozen=True, kw_only=True)
class BeamHypothesis:
    """One result of a search: its tokens without the end token, and its score."""

    tokens: tuple[ScoredToken, ...]
    score: float  # sum of log-probabilities, the end token's too, over length ** length_penalty
    finish: FinishReason

    @property
    def token_ids(self) -> list[int]:
        """Token ids alone."""
        return [token.chosen.token_id for token in self.tokens]


@dataclass(frozen=True, kw_only=True)
class _Beam:
    """A beam's last token; beams share their common prefixes as linked lists."""

    token: ScoredToken
    before: "_Beam | None"
    total: float  # sum of log-probabilities

    def chain(self) -> Iterator[ScoredToken]:
        """All tokens, last one first."""
        beam: _Beam | None = self
        while beam is not None:
            yield beam.token
            beam = beam.before


class BeamSearch:
    """Beam search with the results of transformers' for early_stopping=False.

    Each `advance` takes logits of the live beams, in the order of the last call's `parents` and
    `tokens`: at first one row, that of the prompt. When `done`, `results` are final.
    """

    def __init__(self, sampling: SamplingParams, *, end_ids: frozenset[int]) -> None:
        self.done = False
        self.parents: list[int] = []
        """For each live beam, which of the beams before the last `advance` it continues."""
        self.tokens: list[int] = []
        """For each live beam, its last token."""
        self._sampling = sampling
        self._end_ids = frozenset() if sampling.ignore_eos else end_ids
        self._live: list[_Beam | None] = [None]
        self._finished: list[BeamHypothesis] = []
        self._length = 0

    def advance(self, logits: Tensor) -> None:
        """Advance all live beams by their logits [W, V].

        Raises:
            LogitsError: logits are NaN or infinite.
        """
        assert not self.done
        assert len(logits) == len(self._live)
        candidates = self._candidates(logits)
        self._length += 1
        last = self._length == self._sampling.max_new_tokens
        live = []
        for place, (parent, beam) in enumerate(candidates):
            ends = beam.token.chosen.token_id in self._end_ids
            # worse ones stand by for beams that end
            if (ends or last) and place < self._sampling.num_beams:
                self._finish(beam, "stop" if ends else "length")
            if not ends:
                live.append((parent, beam))
        live = [] if last else live[: self._sampling.num_beams]
        self.parents = [parent for parent, _ in live]
        self._live = [beam for _, beam in live]
        self.tokens = [beam.token.chosen.token_id for _, beam in live]
        self.done = not live or not self._can_improve(live[0][1])

    def results(self, count: int) -> list[BeamHypothesis]:
        """Best results, best first; fewer than `count` only if the vocabulary has no more."""
        return self._finished[:count]

    def _candidates(self, logits: Tensor) -> list[tuple[int, _Beam]]:
        """Best continuations, each with the row that it continues: enough for `num_beams` that do
        not end."""
        vocab_size = logits.shape[-1]
        logprobs = log_probabilities(logits)
        totals = [beam.total if beam else 0.0 for beam in self._live]
        sums = (logprobs + upload(totals, like=logprobs).unsqueeze(1)).flatten()
        # Even if every beam ends with every end token, as many candidates remain that do not end.
        count = min(self._sampling.num_beams * (1 + max(1, len(self._end_ids))), len(sums))
        values, places = likeliest_tokens(sums.unsqueeze(0), count)
        width = min(self._sampling.logprobs or 0, vocab_size)
        if width:
            others, ids = likeliest_tokens(logprobs, width)
        else:
            others, ids = (logprobs[:, :0], logprobs[:, :0])
        found = torch.cat(
            [
                part.double().flatten()
                for part in (logits.amax(-1), values, places, logprobs.take(places), others, ids)
            ]
        ).tolist()  # the only wait for the device
        refuse_unless_finite(found[: len(logits)])
        found = found[len(logits) :]
        likeliest = self._likeliest(found[3 * count :], width)
        candidates = []
        for total, place, logprob in zip(
            found[:count], found[count:], found[2 * count : 3 * count], strict=False
        ):
            parent, token_id = divmod(int(place), vocab_size)
            token = ScoredToken(chosen=TokenScore(token_id, logprob), likeliest=likeliest[parent])
            candidates.append((parent, _Beam(token=token, before=self._live[parent], total=total)))
        # A continuation of probability 0 is none; a small vocabulary may leave fewer than the
        # beams.
        return [(parent, beam) for parent, beam in candidates if beam.total > -torch.inf]

    def _likeliest(self, numbers: list[float], width: int) -> list[tuple[TokenScore, ...]]:
        """Likeliest tokens of each live beam: `numbers` are all log-probabilities, then all ids."""
        rows = len(self._live)
        scores = [
            TokenScore(int(i), p)
            for p, i in zip(numbers[: rows * width], numbers[rows * width :], strict=True)
        ]
        return [tuple(scores[row * width : (row + 1) * width]) for row in range(rows)]

    def _finish(self, beam: _Beam, reason: FinishReason) -> None:
        # The end token counts for the length, as in transformers.
        score = beam.total / self._length**self._sampling.length_penalty
        tokens = tuple(beam.chain())[::-1]
        if reason == "stop":
            tokens = tokens[:-1]  # the end token
        found = BeamHypothesis(tokens=tokens, score=score, finish=reason)
        ranked = sorted([*self._finished, found], key=lambda one: -one.score)
        self._finished = ranked[: self._sampling.num_beams]

    def _can_improve(self, best: _Beam) -> bool:
        """True if the best live beam, at its present length, beats the worst result of a full list."""
        if len(self._finished) < self._sampling.num_beams:
            return True
        return best.total / self._length**self._sampling.length_penalty > self._finished[-1].score
