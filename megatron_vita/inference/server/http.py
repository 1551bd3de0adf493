"""HTTP helpers: reading a body within limits, detecting a disconnected client, server-sent events."""

import asyncio
import json
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from megatron_vita.inference.server.protocol.api_errors import APIError, too_large
from megatron_vita.inference.server.protocol.limits import Limits

KEEP_ALIVE_SECONDS = 15.0
"""A silent stream gets a comment so often, so that no proxy takes it for dead."""

LINGER_SECONDS = 1.0
_NOTES = "notes"  # in a request's state


def note(scope: Scope, **facts: Any) -> None:
    """Add facts to a request's line in the access log. `status` overrides the status that was sent."""
    scope["state"].setdefault(_NOTES, {}).update(facts)


def notes_of(scope: Scope) -> dict[str, Any]:
    """The facts noted about a request."""
    return dict(scope["state"].get(_NOTES, {}))


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the whole body.

    Raises:
        APIError: the content type is wrong, or the body is too large or too slow.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        # Browsers send other types to any site without asking it, so they must not be taken for
        # requests.
        raise APIError(
            "the content type must be application/json", status=415, code="invalid_content_type"
        )
    # Known too large before a byte is read.
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limits.body_bytes:
        raise _body_too_large(f"the body has {int(declared):,} bytes", limits)
    # Content-Length may be missing or wrong, so that the size is also counted.
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _body_too_large(
                        f"the body has more than {limits.body_bytes:,} bytes", limits
                    )
    except TimeoutError as error:
        message = f"the body did not come within {limits.body_seconds:g} seconds"
        raise APIError(message, status=408, headers={"connection": "close"}) from error
    return bytes(body)


def _body_too_large(what: str, limits: Limits) -> APIError:
    refusal = too_large(what, limit="body_bytes", most=limits.body_bytes)
    refusal.headers["connection"] = "close"  # the rest of the body is not read
    return refusal


async def refuse_while_sending(refusal: APIError, request: Request, send: Send) -> None:
    """Send an error to a client that is still sending its body, and discard that body for a moment.

    A connection closed with unread bytes is reset, and the client might lose the response.
    """
    note(request.scope, refused=refusal.code, param=refusal.param)
    body = refusal.response()
    await send(
        {"type": "http.response.start", "status": body.status_code, "headers": body.raw_headers}
    )
    await send({"type": "http.response.body", "body": body.body, "more_body": True})
    with suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(LINGER_SECONDS):
            async for _ in request.stream():
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` and cancel it when the client disconnects. The body must have been read before.

    Raises:
        ClientDisconnect: the client has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        # Both may be done: an answer that is complete is not thrown away.
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        with suppress(BaseException):  # its result was taken above, or nobody wants it
            await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """A response of server-sent events."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send

    async def send(self, data: dict[str, Any] | str) -> None:
        """Send an event: an object as JSON, or a text as it is."""
        if isinstance(data, str):
            text = data
        else:
            text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        await self._write(f"data: {text}\n\n")

    async def comment(self) -> None:
        """Send a comment, which clients ignore."""
        await self._write(": waiting\n\n")

    async def close(self) -> None:
        """End the response."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, text: str) -> None:
        if not self.started:
            self.started = True
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})


class StatusSend:
    """ASGI `send` that records the status of the response."""

    def __init__(self, send: Send) -> None:
        self.status: int | None = None
        self._send = send

    async def __call__(self, message: Message) -> None:
        """Send a message, and keep the status of a response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
