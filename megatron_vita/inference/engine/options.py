"""Settings of an engine, and what it reports of itself."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.parsing.fields import check_fields, described, require


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of an engine. Documented fields are options of the server's command line."""

    chunk_tokens: int = described(
        32768, "Prompt tokens per forward pass; more is faster for very long prompts.", ge=1
    )
    # smaller while outputs wait for their next token, so that they do not pause for long
    busy_chunk_tokens: int = described(4096, ge=1)
    cache_tokens: int | None = described(
        None,
        "Capacity of the key-value cache in tokens (default: what GPU memory leaves; 65,536 on CPU).",
        ge=1,
    )
    cache_dtype: Literal["model", "fp8"] = described("model", "Data type of the key-value cache.")
    page_tokens: int = described(128, ge=1)
    max_running: int = described(64, "Outputs decoded at a time.", ge=1)
    max_context: int | None = described(
        None, "Maximum tokens of a prompt and its output (default: as in training).", ge=1
    )
    media_seconds: float = described(
        60.0,
        "Time limit for probing a video, decoding an image, or decoding 64 frames.",
        gt=0,
        lt=math.inf,
    )
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            self.page_tokens.bit_count() == 1,
            f"page_tokens is {self.page_tokens}: it must be a power of two",
        )


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


NO_USAGE = Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0)


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """Current load of an engine, and totals since its start."""

    running: int
    waiting: int
    cache_tokens: int
    cache_tokens_used: int
    prompt_tokens_total: int
    cached_tokens_total: int
    completion_tokens_total: int
