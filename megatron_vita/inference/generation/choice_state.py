"""State of one of a request's answers: tokens in, text out, until a token, a stop string or a
limit ends it."""

import torch
from torch import Tensor

from megatron_vita.inference.generation.beams import BeamHypothesis
from megatron_vita.inference.generation.detokenizer import TextStream
from megatron_vita.inference.generation.sampling import Penalties, SamplingRow, has_penalties
from megatron_vita.inference.requests.types import (
    FinishReason,
    OutputDelta,
    SamplingParams,
    ScoredToken,
)
from megatron_vita.text.tokenizer_base import Tokenizer


class ChoiceState:
    """One of a request's `n` answers: its tokens, penalties and detokenizer."""

    def __init__(
        self, sampling: SamplingParams, *, request: int, choice: int, tokenizer: Tokenizer
    ) -> None:
        self.sampling = sampling
        self.request = request
        self.choice = choice
        self.ids: list[int] = []
        """Tokens of the answer, without the one that ended it."""
        self.finish: FinishReason | None = None
        self._stream = TextStream(tokenizer, sampling.stop)
        self._penalties: Penalties | None = None

    def set_prompt(
        self, prompt_ids: Tensor, *, vocab_size: int, device: torch.device | str
    ) -> None:
        """Prepare penalties, before the first token is sampled: prompt_ids [t] int64 on the CPU."""
        if has_penalties(self.sampling):
            self._penalties = Penalties(prompt_ids, vocab_size=vocab_size, device=device)

    def sampling_row(self) -> SamplingRow:
        """Sampling parameters of the next token."""
        return SamplingRow(
            sampling=self.sampling,
            choice=self.choice,
            step=len(self.ids),
            penalties=self._penalties,
        )

    def append(self, scored: ScoredToken, *, end_ids: frozenset[int]) -> OutputDelta:
        """Add a sampled token. One of `end_ids` ends the answer and is not part of it, unless
        `ignore_eos` is set."""
        assert self.finish is None
        token_id = scored.chosen.token_id
        if token_id in end_ids and not self.sampling.ignore_eos:
            return self._end("stop")
        self.ids.append(token_id)
        if self._penalties is not None:
            self._penalties.add(token_id)
        text = self._stream.push(token_id)
        if self._stream.stopped:
            return self._end("stop", text=text, tokens=(scored,))
        if len(self.ids) >= self.sampling.max_new_tokens:
            return self._end("length", text=text, tokens=(scored,))
        return self._delta(text, tokens=(scored,))

    def append_beam(self, answer: BeamHypothesis) -> OutputDelta:
        """Add the whole answer of a beam search, up to a stop string."""
        assert self.finish is None
        text = ""
        for token in answer.tokens:
            self.ids.append(token.chosen.token_id)
            text += self._stream.push(self.ids[-1])
            if self._stream.stopped:
                break
        # A stop string may end the text before the hypothesis does.
        return self._end(answer.finish, text=text, tokens=answer.tokens[: len(self.ids)])

    def stop_at_length(self) -> OutputDelta:
        """End the answer for want of room for another token."""
        return self._end("length")

    def cancel(self) -> OutputDelta:
        """End the output of a cancelled request."""
        return self._end("cancelled")

    def fail(self, error: str, *, finish: FinishReason = "error") -> OutputDelta:
        """End the output with an error message for the client."""
        return self._end(finish, error=error)

    def _end(
        self,
        reason: FinishReason,
        *,
        text: str = "",
        tokens: tuple[ScoredToken, ...] = (),
        error: str = "",
    ) -> OutputDelta:
        assert self.finish is None
        text += self._stream.finish()
        stopped = reason == "length" and self._stream.stopped  # by characters that were held back
        self.finish = "stop" if stopped else reason
        return self._delta(text, tokens=tokens, error=error)

    def _delta(self, text: str, *, tokens: tuple[ScoredToken, ...], error: str = "") -> OutputDelta:
        return OutputDelta(
            request=self.request,
            choice=self.choice,
            text=text,
            token_ids=tuple(token.chosen.token_id for token in tokens),
            scores=() if self.sampling.logprobs is None else tokens,
            finish=self.finish,
            error=error,
        )
