"""Responses of OpenAI's chat completions API, whole or streamed."""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vita.inference.requests.types import OutputDelta, ScoredToken, TokenScore
from megatron_vita.inference.server.service.interface import PreparedPrompt, Usage

TokenBytes = Callable[[int], bytes]
"""Bytes of a token by its id; some tokens are parts of a character."""


@dataclass(frozen=True, kw_only=True)
class ResponseBuilder:
    """Builder of the response objects of one request."""

    model: str
    prepared: PreparedPrompt
    token_bytes: TokenBytes
    with_logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, choices: Iterable[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """Build a `chat.completion.chunk`."""
        return self._head("chat.completion.chunk") | {"choices": list(choices)} | extra

    def opening(self, n: int) -> dict[str, Any]:
        """Build the first chunk: the role of all `n` choices, and the frames sampled from videos."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        choices = [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(n)
        ]
        return self.chunk(choices, **self._videos())

    def continuation(self, delta: OutputDelta) -> dict[str, Any] | None:
        """Build the chunk of an output delta; None if the delta holds nothing to show."""
        # Held-back text gives empty deltas.
        if not (delta.text or delta.finish or delta.scores):
            return None
        choice = {
            "index": delta.choice,
            "delta": {"content": delta.text} if delta.text or delta.scores else {},
            "logprobs": self._logprobs(delta.scores) if delta.scores else None,
            "finish_reason": delta.finish,
        }
        return self.chunk([choice])

    def completion(self, deltas: Iterable[OutputDelta], *, n: int, usage: Usage) -> dict[str, Any]:
        """Build the `chat.completion` of all output deltas."""
        choices = [_Choice() for _ in range(n)]
        for delta in deltas:
            choices[delta.choice].add(delta)
        listed = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                "logprobs": self._logprobs(choice.scores) if self.with_logprobs else None,
                "finish_reason": choice.finish,
            }
            for i, choice in enumerate(choices)
        ]
        return (
            self._head("chat.completion")
            | {"choices": listed, "usage": usage_object(usage)}
            | self._videos()
        )

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _videos(self) -> dict[str, Any]:
        """The extension `videos`: duration and sampled timestamps of each video, in seconds."""
        videos = [
            {"name": v.name, "duration": v.duration, "times": list(v.times)}
            for v in self.prepared.videos
        ]
        if videos:
            return {"videos": videos}
        return {}

    def _logprobs(self, scores: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            self._token(score.chosen)
            | {"top_logprobs": [self._token(other) for other in score.likeliest]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, score: TokenScore) -> dict[str, Any]:
        data = self.token_bytes(score.token_id)
        # JSON has no minus infinity; OpenAI's documents give -9999.0 for tokens that are next to
        # impossible.
        return {
            "token": data.decode(errors="replace"),
            "bytes": list(data),
            "logprob": max(score.logprob, -9999.0),
        }


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    scores: list[ScoredToken] = field(default_factory=list)
    finish: str | None = None

    def add(self, delta: OutputDelta) -> None:
        self.texts.append(delta.text)
        self.scores += delta.scores
        self.finish = delta.finish or self.finish


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage` object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
