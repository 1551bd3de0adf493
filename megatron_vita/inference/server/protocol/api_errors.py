"""Errors sent to clients, in OpenAI's format."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.inference.server.service.service import EngineFailedError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2

NO_RETRY: Mapping[str, str] = {"x-should-retry": "false"}
"""Told to clients that repeat failed requests of themselves, as OpenAI's do."""


class APIError(VitaError):
    """A request that is rejected or fails: HTTP status, and the fields of OpenAI's error object."""

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
        """OpenAI's error object: `{"error": {"message", "type", "param", "code"}}`."""
        # The names that OpenAI's API has for these statuses.
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def too_large(
    what: str, *, limit: str, most: int, param: str | None = None, status: int = 413
) -> APIError:
    """Error for `what`, which exceeds the limit `most` set by the server's option --`limit`."""
    option = f"--{limit.replace('_', '-')}"
    message = f"{what}: the limit is {most:,} (the server's option {option})"
    return APIError(message, status=status, param=param, code=f"{limit}_exceeded")


def stopping(message: str, headers: Mapping[str, str] | None = None) -> APIError:
    """Error 503 of a server that is shutting down."""
    return APIError(message, status=503, code="stopping", headers=headers)


def engine_failed(message: str, headers: Mapping[str, str] | None = None) -> APIError:
    """Error 503 of a server whose engine has failed."""
    return APIError(message, status=503, code="engine_failed", headers=headers)


def too_many_requests(whose: str, *, limit: str, most: int) -> APIError:
    """Error 429: `most` requests of `whose` kind are open, as the option --`limit` allows."""
    option = f"--{limit.replace('_', '-')}"
    return APIError(
        f"{most} {whose} are open, which is the limit (the server's option {option}): "
        f"try again in {RETRY_SECONDS} seconds",
        status=429,
        code=f"{limit}_exceeded",
        headers={"retry-after": str(RETRY_SECONDS)},
    )


def api_error_of(error: Exception, *, request_seconds: float) -> APIError:
    """Convert any exception to an error for the client."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, DataError | ConfigError):  # the prompt is wrong, or does not fit
        part = re.match(r"messages\[\d+\]\.content\[\d+\]", str(error))  # the name of a medium
        return APIError(
            str(error), param=part.group() if part else "messages", code="invalid_prompt"
        )
    if isinstance(error, EngineFailedError):
        return engine_failed(str(error))
    if isinstance(error, TimeoutError):
        message = f"no full answer within {request_seconds:g} seconds (the server's option --request-seconds)"
        return APIError(message, status=504, code="request_seconds_exceeded", headers=NO_RETRY)
    # The client gets no details: they may tell about the server's files or other requests.
    logger.error("a request failed", exc_info=error)
    return APIError(
        "the server failed at this request", status=500, code="internal_error", headers=NO_RETRY
    )
