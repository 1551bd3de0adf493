"""HTTP connections with the limits that uvicorn lacks."""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_vita.inference.server.access_log import LineBudget

logger = logging.getLogger(__name__)

_INVALID = LineBudget(10, seconds=60)
_NOISE = (
    "Invalid HTTP request received.",
    "Unsupported upgrade request.",
    "No supported WebSocket library detected.",
)
"""Beginnings of uvicorn's log lines that any client can cause without limit, and that name no client."""


class BoundedConnection(H11Protocol):
    """A connection that is closed if the headers of a request take too long."""

    def __init__(self, *, header_seconds: float, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._header_seconds = header_seconds
        self._headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See uvicorn."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """See uvicorn."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn."""
        self._forget_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """See uvicorn. Logs the client's address, which uvicorn's line lacks, and limits the rate."""
        left_out = _INVALID.take()
        if left_out is not None:
            client = self.client[0] if self.client else "-"
            more = f" ({left_out} such lines were left out before)" if left_out else ""
            logger.info("%s key=- - - 400 refused=invalid_http%s", client, more)
        super().send_400_response(msg)

    def _watch_headers(self) -> None:
        """Run the header timer while a request is awaited; received bytes do not reset it."""
        # A request is being answered; other limits apply to it.
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_timer()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(self._header_seconds, self._close)

    def _forget_timer(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _close(self) -> None:
        # The request may have arrived in the same moment.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def quieten_uvicorn() -> None:
    """Drop uvicorn's log lines that this module replaces by rate-limited ones."""
    named = logging.getLogger("uvicorn.error")
    if _is_no_noise not in named.filters:
        named.addFilter(_is_no_noise)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)
