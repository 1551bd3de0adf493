"""Access log: one line per request, with client, path, status and usage."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_vita.inference.server.access import key_of
from megatron_vita.inference.server.http import StatusSend, notes_of

logger = logging.getLogger(__name__)

_LONGEST = 200
_WATCHED = ("/health", "/metrics")
"""Paths that monitoring requests every few seconds, logged at level DEBUG as long as they succeed."""


class AccessLog:
    """Middleware that logs a request when it has ended, in whatever way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a connection on, and log a request at its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The middleware is the outermost one, and inner code notes its facts here.
        scope.setdefault("state", {})
        watched = StatusSend(send)
        began = time.monotonic()
        try:
            await self._app(scope, receive, watched)
        finally:
            _write(scope, status=watched.status, seconds=time.monotonic() - began)


def _write(scope: Scope, *, status: int | None, seconds: float) -> None:
    facts = notes_of(scope)
    status = facts.pop("status", status)
    is_routine = status == 200 and scope["path"] in _WATCHED
    logger.log(
        logging.DEBUG if is_routine else logging.INFO,
        "%s key=%s %s %s %s %.0fms%s",
        (scope.get("client") or ("-",))[0],
        key_of(scope).hex()[:8] or "-",
        scope["method"][:20],
        # as it was sent: what percent signs stand for could break the line
        scope["raw_path"][:_LONGEST].decode("ascii", errors="replace"),
        status if status is not None else "-",
        1000 * seconds,
        _listed(facts),
    )


def _listed(facts: Mapping[str, Any]) -> str:
    return "".join(f" {name}={_shown(value)}" for name, value in facts.items() if value is not None)


def _shown(value: Any) -> str:
    text = str(value)
    if text.isidentifier() or isinstance(value, int):
        return text
    return f"{text!r:.{_LONGEST}}"


class LineBudget:
    """Rate limit for log lines: at most `most` in `seconds`, so that nobody can flood the log."""

    def __init__(self, most: int, *, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._ends = 0.0
        self._passed = 0
        self._left_out = 0

    def take(self) -> int | None:
        """Take a line.

        Returns:
            The number of lines dropped before it; None if this one must be dropped.
        """
        now = time.monotonic()
        if now >= self._ends:
            self._ends = now + self._seconds
            self._passed = 0
        if self._passed >= self._most:
            self._left_out += 1
            return None
        self._passed += 1
        left_out = self._left_out
        self._left_out = 0
        return left_out
