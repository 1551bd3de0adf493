"""Refused requests, in the form of OpenAI's errors."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from megatron_vita.errors import VitaError

NO_RETRY: Mapping[str, str] = {"x-should-retry": "false"}
"""Told to clients that repeat failed requests of themselves, as OpenAI's do."""


class RefusalError(VitaError):
    """A request that gets no answer: the HTTP status, and what OpenAI's clients look for in an
    error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        """The same as an HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def too_large(
    what: str, *, limit: str, most: int, param: str | None = None, status: int = 413
) -> RefusalError:
    """`what` is more than `most`, which the server's option --`limit` sets."""
    option = f"--{limit.replace('_', '-')}"
    message = f"{what}: the limit is {most:,} (the server's option {option})"
    return RefusalError(message, status=status, param=param, code=f"{limit}_exceeded")
