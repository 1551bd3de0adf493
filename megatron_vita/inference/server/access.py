"""Who may use the server: API keys, and without them not the pages of other sites."""

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
from megatron_vita.inference.server.refusals import RefusalError

VARIABLE = "VITA_API_KEY"
_GUARDED = ("/v1/", "/metrics")
_KEY = "api_key_digest"  # in a request's state


def read_keys(path: Path | None) -> list[str]:
    """The keys in a file, one a line, or in the environment variable VITA_API_KEY; none: the server
    is open.

    ConfigError if the file cannot be read or holds none: nobody asks for keys and wants an open
    server.
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
    """SHA-256 of the API key that a request bears; empty on a server without keys."""
    digest: bytes = scope["state"].get(_KEY, b"")
    return digest


def cache_salt(key: bytes, salt: str | None) -> bytes:
    """Give what tells apart equal beginnings of prompts of different keys, or of requests with
    different `cache_salt`; empty where all may share them."""
    if not key and salt is None:
        return b""
    return hashlib.sha256(key + (salt or "").encode()).digest()


class RequireKey:
    """Lets requests to the API and the metrics pass which bear one of the keys."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or refuses without a look at the body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        digest = _digest(_bearer_key(Headers(scope=scope)))
        is_known = self._is_known(digest)
        if is_known:
            scope["state"][_KEY] = digest
        if scope["path"].startswith(_GUARDED) and not is_known:
            headers = {"www-authenticate": "Bearer", "connection": "close"}
            refusal = RefusalError(
                "an API key is needed: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers=headers,
            )
            await refuse_while_sending(refusal, Request(scope, receive), send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, digest: bytes) -> bool:
        """Takes as long whatever the key is."""
        # all are compared
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class RefuseForeignPages:
    """Refuses what browsers send for pages of other sites. Who is no browser names no origin, and
    passes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or refuses without a look at the body."""
        if scope["type"] == "http" and scope["method"] == "POST" and _is_foreign(scope):
            message = "pages of other sites get no answer from a server without keys: set one, or open the server's own"
            refusal = RefusalError(
                message, status=403, code="foreign_origin", headers={"connection": "close"}
            )
            await refuse_while_sending(refusal, Request(scope, receive), send)
        else:
            await self._app(scope, receive, send)


def _is_foreign(scope: Scope) -> bool:
    """Whether a page of another host sent a request, or one whose name was made to point to this
    machine."""
    headers = Headers(scope=scope)
    if (origin := headers.get("origin")) is None:
        return False
    host = headers.get("host", "").lower()
    if not host or origin.lower().partition("://")[2] != host:
        return True
    return _is_address(scope["server"][0], of_this_machine=True) and not _is_own_name(host)


def _is_own_name(host: str) -> bool:
    """Whether nobody elsewhere can decide where a host leads: those of names with a dot can."""
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
