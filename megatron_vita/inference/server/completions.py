"""POST /v1/chat/completions, from the request body to the last token."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import OutputDelta, SamplingParams
from megatron_vita.inference.server.access import cache_salt, key_of
from megatron_vita.inference.server.http import (
    KEEP_ALIVE_SECONDS,
    EventStream,
    StatusSend,
    note,
    read_body,
    refuse_while_sending,
    while_connected,
)
from megatron_vita.inference.server.metrics import Metrics
from megatron_vita.inference.server.protocol.api_errors import (
    NO_RETRY,
    APIError,
    api_error_of,
    engine_failed,
    stopping,
    too_large,
    too_many_requests,
)
from megatron_vita.inference.server.protocol.bodies import BodyPlaces
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.media import MediaLoader, about, check_pixels
from megatron_vita.inference.server.protocol.parsing import parse_request
from megatron_vita.inference.server.protocol.protocol import ChatRequest
from megatron_vita.inference.server.protocol.responses import ResponseBuilder, usage_object
from megatron_vita.inference.server.protocol.sampling import max_frames_of, sampling_of
from megatron_vita.inference.server.service.service import (
    EngineFailedError,
    EngineService,
    RequestStream,
)

logger = logging.getLogger(__name__)

CLIENT_GONE = 499
_FAREWELL_SECONDS = 4.0


@dataclass(kw_only=True)
class ChatEndpoint:
    """ASGI application of the chat completions path. `draining` rejects new requests during
    shutdown.

    Prompts with videos wait for decoder processes and are prepared in `probing`; all other slow
    work runs in `pool`.
    """

    service: EngineService
    limits: Limits
    media: MediaLoader
    metrics: Metrics
    pool: Executor
    probing: Executor
    model_name: str
    defaults: SamplingParams
    has_several_keys: bool
    adapters: Sequence[str] = ()
    draining: bool = False
    open_requests: int = field(default=0, init=False)
    _of_key: Counter[bytes] = field(default_factory=Counter, init=False)  # open requests
    _is_cut_off: bool = field(default=False, init=False)
    _cuts: set[asyncio.Timeout] = field(default_factory=set, init=False)  # one of each open request

    def __post_init__(self) -> None:
        self.bodies = BodyPlaces(self.limits.open_bodies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or reject a request; a client that disconnects ends it."""
        counted = StatusSend(send)
        exchange = _Exchange(self, Request(scope, receive, counted), counted)
        try:
            # Before the body is read: a full server should not receive megabytes first.
            self.check_open(key_of(scope))
            async with asyncio.timeout(self.limits.request_seconds):
                await exchange.run()
        except ClientDisconnect:
            counted.status = CLIENT_GONE
        except Exception as error:
            await exchange.refuse(api_error_of(error, request_seconds=self.limits.request_seconds))
        finally:
            status = counted.status or CLIENT_GONE
            self.metrics.requests.labels(status).inc()
            note(scope, status=status)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may give: of the model, and of its adapters."""
        return (self.model_name, *self.adapters)

    def describe_missing_model(self, name: str) -> str:
        """Return the message about a model that is not here."""
        known = ", ".join(repr(each) for each in self.model_names)
        return f"the model {name!r:.200} is not here: this server has {known}"

    @property
    def is_busy(self) -> bool:
        """True while a request is open or its body is being read."""
        return self.open_requests > 0 or len(self.bodies) > 0

    def check_open(self, key: bytes) -> None:
        """Raise if no request can be accepted.

        Raises:
            EngineFailedError: the engine has failed.
            APIError: the server is stopping, or a limit of open requests is reached.
        """
        if self.service.failure is not None:
            raise EngineFailedError(self.service.failure)
        if self.draining:
            raise stopping("the server is stopping")
        self._check_room(key)

    def _check_room(self, key: bytes) -> None:
        limits = self.limits
        if self.open_requests >= limits.open_requests:
            raise too_many_requests("requests", limit="open_requests", most=limits.open_requests)
        if self.has_several_keys and self._of_key[key] >= limits.open_requests_per_key:
            raise too_many_requests(
                "requests of this API key",
                limit="open_requests_per_key",
                most=limits.open_requests_per_key,
            )

    @contextmanager
    def admitted(self, key: bytes) -> Iterator[None]:
        """Count a request as open inside the context.

        Raises:
            APIError: a limit of open requests is reached.
        """
        self._check_room(key)
        self.open_requests += 1
        self._of_key[key] += 1
        try:
            yield
        finally:
            self.open_requests -= 1
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]

    def cut_off(self) -> None:
        """End all open requests now, and later ones as soon as they begin."""
        self._is_cut_off = True
        for timeout in self._cuts:
            if not timeout.expired():
                # Timeouts are the one way to interrupt a task that waits for anything at all.
                timeout.reschedule(0)

    @asynccontextmanager
    async def until_cut_off(self, headers: Mapping[str, str] | None = None) -> AsyncIterator[None]:
        """Run the context until it ends or `cut_off` is called.

        Raises:
            APIError: `cut_off` was called; it carries `headers`.
        """
        try:
            # Requests that arrive after `cut_off` end at their first wait.
            async with asyncio.timeout(0 if self._is_cut_off else None) as timeout:
                self._cuts.add(timeout)
                yield
        except TimeoutError as error:
            if not timeout.expired():
                raise
            raise self._end_of_request(headers) from error
        finally:
            self._cuts.discard(timeout)

    def _end_of_request(self, headers: Mapping[str, str] | None) -> APIError:
        """The error for a request that is cut off."""
        if self.service.failure is None:
            return stopping("the request was cut off: the server is stopping", headers)
        return engine_failed(self.service.failure, headers)


class _Exchange:
    """One HTTP request and its response."""

    def __init__(self, endpoint: ChatEndpoint, request: Request, send: Send) -> None:
        self._endpoint = endpoint
        self._request = request
        self._send = send
        self._events = EventStream(send)
        self._began = time.monotonic()
        self._first: float | None = None

    async def run(self) -> None:
        """Read the body, prepare the prompt and answer. Errors are raised to the caller."""
        endpoint = self._endpoint
        request = self._request
        async with (
            # If it is cut off here, the rest of the body is unread and would be taken for the next
            # request, so the connection closes.
            endpoint.until_cut_off({"connection": "close"}),
            endpoint.bodies.place(self._client),
        ):
            body = await read_body(request, endpoint.limits)
        with endpoint.admitted(key_of(request.scope)):
            async with endpoint.until_cut_off():
                await while_connected(request.receive, self._answer(body))

    @property
    def _client(self) -> Hashable:
        """Identity of the sender: its API key, or its address on a server without keys."""
        client = self._request.client
        return key_of(self._request.scope) or (client and client.host)

    async def refuse(self, refusal: APIError) -> None:
        """Send an error, as the response or as the last event of a stream that has begun."""
        note(self._request.scope, refused=refusal.code, param=refusal.param)
        try:
            # whoever does not read his answer gets none
            async with asyncio.timeout(_FAREWELL_SECONDS):
                if self._events.started:
                    await self._events.send(refusal.body())
                    await self._events.close()
                elif refusal.headers.get("connection") == "close":
                    await refuse_while_sending(refusal, self._request, self._send)
                else:
                    await refusal.response()(self._request.scope, self._request.receive, self._send)
        except TimeoutError:
            logger.warning("a client does not read its error response; the connection is dropped")

    async def _answer(self, body: bytes) -> None:
        endpoint = self._endpoint
        request: ChatRequest = await _in_threads(
            endpoint.pool, partial(parse_request, body, limits=endpoint.limits)
        )
        del body
        builder, stream = await self._begin(request)
        # The messages hold media in base64, while an answer may take minutes.
        request = request.model_copy(update={"messages": []})
        try:
            if request.stream:
                await self._stream(builder, stream, includes_usage=request.includes_usage)
            else:
                await self._complete(builder, stream)
        finally:
            # Whatever happened: nobody reads the stream any longer.
            endpoint.service.cancel(stream)
        self._observe(stream)

    async def _begin(self, request: ChatRequest) -> tuple[ResponseBuilder, RequestStream]:
        """Submit a request to the engine.

        Returns:
            The builder of its response, and the stream of its output deltas.
        """
        endpoint = self._endpoint
        if request.model not in endpoint.model_names:
            message = endpoint.describe_missing_model(request.model)
            raise APIError(message, status=404, param="model", code="model_not_found")
        sampling = sampling_of(
            request,
            limits=endpoint.limits,
            # Equal requests without a seed get different outputs, as at OpenAI.
            default_seed=secrets.randbits(63),
            defaults=endpoint.defaults,
        )
        max_frames = max_frames_of(request, limits=endpoint.limits)
        prepared = await self._prepare(request, max_frames)
        builder = ResponseBuilder(
            model=request.model,
            prepared=prepared,
            token_bytes=endpoint.service.engine.tokenizer.token_bytes,
            with_logprobs=bool(request.logprobs),
        )
        return builder, await endpoint.service.submit(prepared, sampling)

    async def _prepare(self, request: ChatRequest, max_frames: int | None) -> Any:
        """Load media and tokenize the prompt.

        Raises:
            APIError, DataError: the prompt is invalid or exceeds a limit.
        """
        endpoint = self._endpoint
        images, videos = await endpoint.media.load(request)
        prompt = Prompt(
            messages=request.prompt_messages(),
            images=images,
            videos=videos,
            cache_salt=cache_salt(key_of(self._request.scope), request.cache_salt),
            adapter="" if request.model == endpoint.model_name else request.model,
        )
        prepare = partial(endpoint.service.engine.prepare, prompt)
        # Waiting for decoder processes must not use up the threads that all other requests need.
        pool = endpoint.probing if videos else endpoint.pool
        prepared = await _in_threads(pool, partial(prepare, max_frames=max_frames))
        most = endpoint.limits.video_frames
        # The recipe may sample more frames than this server allows; the limit wins.
        if any(len(video.times) > most for video in prepared.videos):
            prepared = await _in_threads(pool, partial(prepare, max_frames=most))
        for video in prepared.videos:
            try:
                check_pixels(video.size, endpoint.limits)
            except APIError as error:
                raise about(video.name, error) from error
        if prepared.tokens > endpoint.limits.prompt_tokens:
            raise too_large(
                f"the prompt has {prepared.tokens:,} tokens",
                limit="prompt_tokens",
                most=endpoint.limits.prompt_tokens,
                param="messages",
                status=400,
            )
        return prepared

    async def _complete(self, builder: ResponseBuilder, stream: RequestStream) -> None:
        deltas = [delta async for delta in self._deltas(stream)]
        assert stream.usage is not None, "the last delta brings the usage"
        answer = builder.completion(deltas, n=stream.choices, usage=stream.usage)
        await JSONResponse(answer)(self._request.scope, self._request.receive, self._send)

    async def _stream(
        self, builder: ResponseBuilder, stream: RequestStream, *, includes_usage: bool
    ) -> None:
        extra = {"usage": None} if includes_usage else {}
        await self._events.send(builder.opening(stream.choices) | extra)
        # Prefill of a long prompt may take minutes, in which proxies would give the connection up.
        pulse = asyncio.create_task(self._keep_alive())
        try:
            async for delta in self._deltas(stream):
                chunk = builder.continuation(delta)
                if chunk is not None:
                    await self._events.send(chunk | extra)
        finally:
            pulse.cancel()
        if includes_usage and stream.usage is not None:
            await self._events.send(builder.chunk([], usage=usage_object(stream.usage)))
        await self._events.send("[DONE]")
        await self._events.close()

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            await self._events.comment()

    async def _deltas(self, stream: RequestStream) -> AsyncIterator[OutputDelta]:
        """Yield the output deltas of a request.

        Raises:
            APIError: a medium could not be decoded, or the model's logits are not finite.
        """
        async for delta in stream:
            if self._first is None and (delta.token_ids or delta.text):
                self._first = time.monotonic() - self._began
            if delta.finish == "error":
                raise APIError(delta.error, code="invalid_media")
            if delta.finish == "model_error":
                raise APIError(delta.error, status=500, code="model_error", headers=NO_RETRY)
            yield delta

    def _observe(self, stream: RequestStream) -> None:
        total = time.monotonic() - self._began
        # An empty output has no first token.
        first = total if self._first is None else self._first
        self._endpoint.metrics.first_token.observe(first)
        self._endpoint.metrics.total.observe(total)
        if (usage := stream.usage) is not None:
            note(
                self._request.scope,
                prompt=usage.prompt_tokens,
                cached=usage.cached_tokens,
                completion=usage.completion_tokens,
                first_ms=round(1000 * first),
            )


async def _in_threads[T](pool: Executor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)
