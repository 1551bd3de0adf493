"""Types of requests and outputs of the engine: sampling parameters, scored tokens, output deltas."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_vita.errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled", "error", "model_error"]
"""`stop`: the model ended its turn or a stop string came; `length`: max_new_tokens or the context's end; `error`: what
was asked cannot be answered, such as a damaged image; `model_error`: the model's logits are no numbers."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request. Temperature 0 is greedy decoding."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    # of tokens in prompt or answer (CTRL, arXiv 1909.05858, section 4.1)
    repetition_penalty: float = 1.0
    # taken from the logit of each token that the answer has (OpenAI's definition)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0  # the same, times how often
    stop: tuple[str, ...] = ()  # the answer ends before the first of these
    seed: int = 0
    n: int = 1  # answers to draw
    # with each token its log-probability and those of this many likeliest ones
    logprobs: int | None = None
    num_beams: int = 1  # above 1: beam search, whose `n` best answers are given
    length_penalty: float = 1.0  # of beam search: scores are divided by length to this power
    ignore_eos: bool = False  # goes on to max_new_tokens whatever the model says

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
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        if self.num_beams > 1 and (
            self.temperature > 0 or self.n > self.num_beams or penalties != (1, 0, 0)
        ):
            raise ConfigError(
                f"num_beams is {self.num_beams}: beam search needs temperature 0, no penalties, and n of at most as many"
            )


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
