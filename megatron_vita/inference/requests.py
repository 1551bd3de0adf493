"""Types of requests and outputs of the engine: sampling parameters, scored tokens, output deltas."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from megatron_vita.config import GenerationConfig
from megatron_vita.config.fields import described
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

    max_new_tokens: int = described(256, "Maximum number of tokens per output.")
    temperature: float = described(0.0, "Sampling temperature; 0 is greedy decoding.")
    top_k: int = described(0, "Sample from the k most likely tokens; 0 means all.")
    top_p: float = described(
        1.0, "Sample from the smallest set of likeliest tokens with this total probability."
    )
    # CTRL's definition (arXiv 1909.05858, section 4.1)
    repetition_penalty: float = described(
        1.0, "Above 1: makes tokens of the prompt and the output less likely."
    )
    # OpenAI's definitions of both
    presence_penalty: float = described(
        0.0, "Subtracted from the logit of each token that the output has."
    )
    frequency_penalty: float = described(
        0.0, "Subtracted from a token's logit for each time that the output has it."
    )
    stop: tuple[str, ...] = described((), "End the output before this text (repeatable).")
    seed: int = described(0, "Seed of the sampling.")
    n: int = described(1, "Number of outputs.")
    logprobs: int | None = described(
        None, "Return log-probabilities of tokens and of this many likeliest alternatives."
    )
    num_beams: int = described(1, "Above 1: beam search, which returns its `n` best outputs.")
    length_penalty: float = described(
        1.0, "Beam search: scores are divided by the length to this power."
    )
    ignore_eos: bool = described(False, "Continue to max_new_tokens after an end token.")

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "from 0 to 100"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "from -2 to 2"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            "stop": (len(self.stop) <= 16 and all(self.stop), "at most 16 strings, none empty"),
            "seed": (0 <= self.seed < 1 << 63, "from 0 to 2**63 - 1"),
            "n": (1 <= self.n <= 128, "from 1 to 128"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 20, "from 0 to 20"),
            "num_beams": (1 <= self.num_beams <= 64, "from 1 to 64"),
            "length_penalty": (-10 <= self.length_penalty <= 10, "from -10 to 10"),
        }
        for name, (right, wanted) in checks.items():
            if not right:  # a comparison with NaN is false, so NaN is refused too
                # a number may have thousands of digits
                raise ConfigError(f"{name} is {getattr(self, name)!r:.40}: it must be {wanted}")
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
    error: str = ""  # what went wrong, to be shown to whoever asked


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
