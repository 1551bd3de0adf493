"""Access control: API keys, and on a server without keys the rejection of other sites' pages."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_vita.errors import ConfigError
from megatron_vita.inference.server.http import refuse_while_sending
from megatron_vita.inference.server.protocol.api_errors import APIError

VARIABLE = "VITA_API_KEY"
_GUARDED = ("/v1/", "/metrics")
_KEY = "api_key_digest"  # in a request's state


def read_keys(path: Path | None) -> list[str]:
    """Read API keys from a file, one per line, or else from the environment variable VITA_API_KEY.

    Returns:
        The keys; an empty list leaves the server open.

    Raises:
        ConfigError: the file is unreadable or empty: a server meant to have keys must not be open.
    """
    if path is None:
        if key := os.environ.get(VARIABLE, "").strip():
            return [key]
        return []
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of API keys {path} cannot be read: {error}") from error
    if not keys:
        raise ConfigError(f"the file of API keys {path} holds none: one a line is needed")
    return keys


def key_of(scope: Scope) -> bytes:
    """SHA-256 of a request's API key; empty on a server without keys."""
    digest: bytes = scope["state"].get(_KEY, b"")
    return digest


def cache_salt(key: bytes, salt: str | None) -> bytes:
    """Salt of the prefix cache, so that requests with different API keys or `cache_salt` fields
    share no blocks; empty where all may share them."""
    if not key and salt is None:
        return b""
    return hashlib.sha256(key + (salt or "").encode()).digest()


class RequireKey:
    """Middleware that lets only requests with a known API key reach the API and the metrics."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or reject it without reading the body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Digests have one length, so that comparing them leaks nothing about the keys.
        digest = _digest(_bearer_key(Headers(scope=scope)))
        is_known = self._is_known(digest)
        if is_known:
            scope["state"][_KEY] = digest
        # Other paths stay open: load balancers ask /health without a key.
        if scope["path"].startswith(_GUARDED) and not is_known:
            headers = {"www-authenticate": "Bearer", "connection": "close"}
            refusal = APIError(
                "an API key is needed: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers=headers,
            )
            await refuse_while_sending(refusal, Request(scope, receive), send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, digest: bytes) -> bool:
        """Compare with all keys, so that the time does not depend on which one matches."""
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class RefuseForeignPages:
    """Middleware that rejects browser requests from other sites' pages. Clients that are no
    browsers send no Origin header and pass."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or reject it without reading the body."""
        if scope["type"] == "http" and scope["method"] == "POST" and _is_foreign(scope):
            message = "pages of other sites get no answer from a server without keys: set one, or open the server's own"
            refusal = APIError(
                message, status=403, code="foreign_origin", headers={"connection": "close"}
            )
            await refuse_while_sending(refusal, Request(scope, receive), send)
        else:
            await self._app(scope, receive, send)


def _is_foreign(scope: Scope) -> bool:
    """True for a request of another site's page, or of one whose domain name resolves to this
    machine."""
    headers = Headers(scope=scope)
    # Browsers always send an Origin header with POST.
    if (origin := headers.get("origin")) is None:
        return False
    host = headers.get("host", "").lower()
    if not host or origin.lower().partition("://")[2] != host:
        return True
    # DNS rebinding: a foreign name that resolves to this machine makes its page same-origin.
    return _is_address(scope["server"][0], of_this_machine=True) and not _is_own_name(host)


def _is_own_name(host: str) -> bool:
    """True for a host name that no outsider can point at this machine: one without a dot, below
    .localhost, or an IP address. This guards against DNS rebinding."""
    try:
        name = urlsplit(f"//{host}").hostname or "."
    except ValueError:
        return False
    return "." not in name or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str, *, of_this_machine: bool = False) -> bool:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or not of_this_machine


def _bearer_key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
