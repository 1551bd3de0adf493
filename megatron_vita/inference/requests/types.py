"""Types of requests and outputs of the engine: sampling parameters, scored tokens, output deltas."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from megatron_vita.config import GenerationConfig
from megatron_vita.config.parsing.fields import check_fields, described, require
from megatron_vita.errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled", "error", "model_error"]
"""`stop`: the model ended its turn or a stop string came; `length`: max_new_tokens or the context's end; `error`: what
was asked cannot be answered, such as a damaged image; `model_error`: the model's logits are no numbers."""


ADVISED = tuple(field.name for field in dataclasses.fields(GenerationConfig))
"""Fields for which a recipe may have defaults."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request.

    A documented field is also an option of the command-line client and a field of the server's
    requests, under the same name; `stop`, `max_new_tokens` and `logprobs` differ as in OpenAI's API.
    """

    max_new_tokens: int = described(256, "Maximum number of tokens per output.", ge=1)
    temperature: float = described(0.0, "Sampling temperature; 0 is greedy decoding.", ge=0, le=100)
    top_k: int = described(0, "Sample from the k most likely tokens; 0 means all.", ge=0)
    top_p: float = described(
        1.0,
        "Sample from the smallest set of likeliest tokens with this total probability.",
        gt=0,
        le=1,
    )
    # CTRL's definition (arXiv 1909.05858, section 4.1)
    repetition_penalty: float = described(
        1.0, "Above 1: makes tokens of the prompt and the output less likely.", ge=0.01, le=100
    )
    # OpenAI's definitions of both
    presence_penalty: float = described(
        0.0, "Subtracted from the logit of each token that the output has.", ge=-2, le=2
    )
    frequency_penalty: float = described(
        0.0, "Subtracted from a token's logit for each time that the output has it.", ge=-2, le=2
    )
    stop: tuple[str, ...] = described((), "End the output before this text (repeatable).")
    seed: int = described(0, "Seed of the sampling.", ge=0, lt=1 << 63)
    n: int = described(1, "Number of outputs.", ge=1, le=128)
    logprobs: int | None = described(
        None,
        "Return log-probabilities of tokens and of this many likeliest alternatives.",
        ge=0,
        le=20,
    )
    num_beams: int = described(
        1, "Above 1: beam search, which returns its `n` best outputs.", ge=1, le=64
    )
    length_penalty: float = described(
        1.0, "Beam search: scores are divided by the length to this power.", ge=-10, le=10
    )
    ignore_eos: bool = described(False, "Continue to max_new_tokens after an end token.")

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            len(self.stop) <= 16 and all(self.stop),
            f"stop is {self.stop!r:.40}: it must be at most 16 strings, none empty",
        )
        # Beams are ranked by the model's own probabilities, which these would change.
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if self.num_beams > 1 and (
            self.temperature > 0 or self.n > self.num_beams or penalties != (1, 0, 0)
        ):
            raise ConfigError(
                f"num_beams is {self.num_beams}: beam search needs temperature 0, no penalties, and n of at most as many"
            )


def advised(
    base: SamplingParams, generation: GenerationConfig, *, fields: Collection[str]
) -> SamplingParams:
    """Replace those `fields` of `base` for which a recipe has defaults.

    Raises:
        ConfigError: a value is out of range.
    """
    defaults = {name: getattr(generation, name) for name in fields}
    values = {name: value for name, value in defaults.items() if value is not None}
    return dataclasses.replace(base, **values)


@dataclass(frozen=True)
class TokenScore:
    """A token and its natural-log probability under the model's distribution, before temperature
    and penalties."""

    token_id: int
    logprob: float


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """A sampled token with the most likely alternatives, best first; empty where logprobs is 0."""

    chosen: TokenScore
    likeliest: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OutputDelta:
    """Output that one engine step adds to one choice of a request.

    Text once delivered is final: incomplete characters and possible beginnings of stop strings are
    held back. The deltas' texts joined are the whole output. Beam search delivers everything in one
    last delta per choice.
    """

    request: int
    choice: int = 0  # which of the request's n answers
    text: str = ""
    token_ids: tuple[int, ...] = ()
    scores: tuple[ScoredToken, ...] = ()  # where logprobs were asked for, one for each of token_ids
    finish: FinishReason | None = None  # the last piece of this answer has one
    error: str = ""  # error message for the client


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """Complete output of one choice."""

    text: str
    token_ids: list[int]
    finish: FinishReason
    scores: list[ScoredToken] = field(default_factory=list)
    error: str = ""

    @property
    def finished(self) -> bool:
        """True if the model or a stop string ended the output, false if a limit did."""
        return self.finish == "stop"
