"""Settings of an engine, and what it reports of itself."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_vita.config.fields import described
from megatron_vita.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Sizes and limits of an engine. Documented fields are options of the server's command line."""

    chunk_tokens: int = described(
        32768, "Prompt tokens per forward pass; more is faster for very long prompts."
    )
    # smaller while outputs wait for their next token, so that they do not pause for long
    busy_chunk_tokens: int = 4096
    cache_tokens: int | None = described(
        None,
        "Capacity of the key-value cache in tokens (default: what GPU memory leaves; 65,536 on CPU).",
    )
    cache_dtype: Literal["model", "fp8"] = described("model", "Data type of the key-value cache.")
    page_tokens: int = 128
    max_running: int = described(64, "Outputs decoded at a time.")
    max_context: int | None = described(
        None, "Maximum tokens of a prompt and its output (default: as in training)."
    )
    media_seconds: float = described(
        60.0, "Time limit for probing a video, decoding an image, or decoding 64 frames."
    )
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "busy_chunk_tokens", "page_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 < self.media_seconds < math.inf:
            raise ConfigError(f"media_seconds is {self.media_seconds}: it must be positive")
        if self.page_tokens & (self.page_tokens - 1):
            raise ConfigError(f"page_tokens is {self.page_tokens}: it must be a power of two")
        if self.cache_dtype not in ("model", "fp8"):
            raise ConfigError(f"cache_dtype is {self.cache_dtype!r}; known: model, fp8")


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
