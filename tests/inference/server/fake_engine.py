"""An engine that needs no model: its answers, speed and end are set by the test."""

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_vita.errors import DataError, EngineError
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import (
    FinishReason,
    OutputDelta,
    SamplingParams,
    ScoredToken,
    TokenScore,
)
from megatron_vita.media.images import image_size
from megatron_vita.media.video import frame_times, probe_video
from megatron_vita.text.conversation import TextPart, check_messages

IMAGE_TOKENS = 256
MAX_FRAMES = 16


@dataclass(frozen=True, kw_only=True)
class FakeVideo:
    name: str
    duration: float
    size: tuple[int, int]
    times: list[float]


@dataclass(frozen=True, kw_only=True)
class FakePrepared:
    text: str
    images: int
    tokens: int
    tiles: int
    videos: list[FakeVideo]


@dataclass(frozen=True, kw_only=True)
class FakeUsage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class FakeStatistics:
    running: int = 0
    waiting: int = 0
    cache_tokens: int = 65536
    cache_tokens_used: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    completion_tokens_total: int = 0


class ByteTokenizer:
    """Each byte is a token."""

    def token_bytes(self, index: int) -> bytes:
        return bytes([index])


@dataclass
class _Request:
    prepared: FakePrepared
    sampling: SamplingParams
    answer: bytes
    said: list[int] = field(default_factory=list)  # bytes of each choice
    open: list[bool] = field(default_factory=list)
    cancelled: bool = False


@dataclass
class FakeEngine:
    """Says `reply`, or else what it was asked, `step_bytes` a step; `{choice}` in it is the number
    of the choice."""

    reply: str | None = None
    step_seconds: float = 0.0
    max_context: int = 1 << 20
    fails_after: int | None = None  # steps
    decode_error: str = ""  # ends every answer
    error_finish: FinishReason = "error"
    step_bytes: int = 1
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)

    def __post_init__(self) -> None:
        self.requests: dict[int, _Request] = {}
        self.cancelled: list[int] = []
        self.forgotten: list[int] = []
        self.prompts: list[Prompt] = []
        self.samplings: list[SamplingParams] = []
        self.closed = False
        self.idles = 0
        self.steps = 0
        self.completion_tokens = 0
        self._numbers = itertools.count()
        self._threads: set[int] = set()

    @property
    def has_work(self) -> bool:
        return any(any(request.open) for request in self.requests.values())

    def prepare(self, prompt: Prompt, *, max_frames: int | None = None) -> FakePrepared:
        self.prompts = [*self.prompts[-9:], prompt]
        sample = {
            "messages": prompt.messages,
            "images": [i.name for i in prompt.images],
            "videos": [v.name for v in prompt.videos],
        }
        turns = check_messages(sample, needs_answer=False)
        text = "".join(part.text for part in turns[-1].parts if isinstance(part, TextPart))
        for image in prompt.images:
            image_size(image.data, image.name)
        videos = [self._video(video, max_frames or MAX_FRAMES) for video in prompt.videos]
        tiles = len(prompt.images) + sum(len(video.times) for video in videos)
        return FakePrepared(
            text=text,
            images=len(prompt.images),
            tokens=len(text.encode()) + IMAGE_TOKENS * tiles,
            tiles=tiles,
            videos=videos,
        )

    def _video(self, video: MediaFile, max_frames: int) -> FakeVideo:
        info = probe_video(video.data, video.name)
        times = frame_times(info, max_fps=4.0, max_frames=max_frames)
        return FakeVideo(name=video.name, duration=info.duration, size=info.size, times=times)

    def add(self, prepared: FakePrepared, sampling: SamplingParams) -> int:
        self._own_thread()
        if prepared.tokens + 1 > self.max_context:
            raise DataError(f"the prompt has {prepared.tokens} tokens: {self.max_context - 1} fit")
        number = next(self._numbers)
        answer = self.reply if self.reply is not None else prepared.text
        request = _Request(prepared, sampling, answer.encode())
        request.said = [0] * sampling.n
        request.open = [True] * sampling.n
        self.requests[number] = request
        self.samplings = [*self.samplings[-9:], sampling]
        return number

    def cancel(self, request: int) -> None:
        self._own_thread()
        self.cancelled.append(request)
        self.requests[request].cancelled = True

    def step(self) -> list[OutputDelta]:
        self._own_thread()
        time.sleep(self.step_seconds)
        self.steps += 1
        if self.fails_after is not None and self.steps > self.fails_after:
            raise RuntimeError("rank 1 is gone")
        return [
            self._piece(number, request, choice)
            for number, request in self.requests.items()
            for choice in range(request.sampling.n)
            if request.open[choice]
        ]

    def _piece(self, number: int, request: _Request, choice: int) -> OutputDelta:
        if request.cancelled or self.decode_error:
            request.open[choice] = False
            finish: FinishReason = self.error_finish if self.decode_error else "cancelled"
            return OutputDelta(
                request=number, choice=choice, finish=finish, error=self.decode_error
            )
        answer = request.answer.replace(b"{choice}", str(choice).encode())
        end = min(
            [place for stop in request.sampling.stop if (place := answer.find(stop.encode())) >= 0]
            or [1 << 40]
        )
        answer = answer[:end]
        before = request.said[choice]
        said = request.said[choice] = min(before + self.step_bytes, request.sampling.max_new_tokens)
        tokens = answer[before:said]
        self.completion_tokens += len(tokens)
        is_last = said >= min(len(answer), request.sampling.max_new_tokens)
        request.open[choice] = not is_last
        # half characters are held back
        text = answer[:said].decode(errors="ignore")[len(answer[:before].decode(errors="ignore")) :]
        return OutputDelta(
            request=number,
            choice=choice,
            text=text,
            token_ids=tuple(tokens),
            scores=tuple(self._score(token, request.sampling.logprobs) for token in tokens)
            if request.sampling.logprobs is not None
            else (),
            finish=("length" if said < len(answer) else "stop") if is_last else None,
        )

    def _score(self, token: int, count: int) -> ScoredToken:
        likeliest = tuple(TokenScore((token + i) % 256, -0.5 - i) for i in range(count))
        return ScoredToken(chosen=TokenScore(token, -0.5), likeliest=likeliest)

    def idle(self) -> None:
        self._own_thread()
        self.idles += 1

    def usage(self, request: int) -> FakeUsage:
        found = self.requests[request]
        return FakeUsage(
            prompt_tokens=found.prepared.tokens, cached_tokens=3, completion_tokens=sum(found.said)
        )

    def forget(self, request: int) -> None:
        self._own_thread()
        self.forgotten.append(request)
        del self.requests[request]

    def statistics(self) -> FakeStatistics:
        used = sum(request.prepared.tokens for request in self.requests.values())
        return FakeStatistics(
            running=len(self.requests),
            cache_tokens_used=used,
            completion_tokens_total=self.completion_tokens,
        )

    def on_lost_rank(self, callback: Callable[[EngineError], None]) -> None:
        self.tell_loss = callback

    def close(self) -> None:
        self._own_thread()
        self.closed = True

    def _own_thread(self) -> None:
        self._threads.add(threading.get_ident())
        assert len(self._threads) == 1, "the engine was called from several threads"
