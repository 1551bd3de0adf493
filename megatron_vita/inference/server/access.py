"""Who may use the server: API keys."""

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from megatron_vita.errors import ConfigError
from megatron_vita.inference.server.refusals import RefusalError

VARIABLE = "VITA_API_KEY"
_GUARDED = ("/v1/", "/metrics")


def read_keys(path: Path | None) -> list[str]:
    """The keys in a file, one a line, or in the environment variable VITA_API_KEY; none: the server is open.

    ConfigError if the file cannot be read or holds none: nobody asks for keys and wants an open server.
    """
    if path is None:
        return [key] if (key := os.environ.get(VARIABLE, "").strip()) else []
    try:
        keys = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of API keys {path} cannot be read: {error}") from error
    if not keys:
        raise ConfigError(f"the file of API keys {path} holds none: one a line is needed")
    return keys


class RequireKey:
    """Lets requests to the API and the metrics pass which bear one of the keys."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or refuses before anything of the body is read."""
        if scope["type"] == "http" and scope["path"].startswith(_GUARDED) and not self._is_known(Headers(scope=scope)):
            headers = {"www-authenticate": "Bearer", "connection": "close"}
            refusal = RefusalError(
                "an API key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key", headers=headers
            )
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        """Takes as long whatever the key is."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip() if scheme.lower() == "bearer" else "")
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0  # all are compared


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
