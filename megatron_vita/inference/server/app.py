"""The ASGI application: routes of the server and the objects behind them."""

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route

from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.inference.server.access import RefuseForeignPages, RequireKey
from megatron_vita.inference.server.access_log import AccessLog
from megatron_vita.inference.server.completions import ChatEndpoint
from megatron_vita.inference.server.http import note
from megatron_vita.inference.server.metrics import Metrics
from megatron_vita.inference.server.protocol.api_errors import APIError
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.protocol.media import MediaLoader
from megatron_vita.inference.server.protocol.remote import RemoteFetcher
from megatron_vita.inference.server.protocol.sampling import OPENAI_DEFAULTS
from megatron_vita.inference.server.service.service import EngineService
from megatron_vita.inference.vision.tile_decoder import DECODERS

_PAGE = Path(__file__).with_name("page.html")
_PREPARING_THREADS = 4
_PROBING_THREADS = DECODERS
"""Threads that wait for media decoders: fewer than there are decoders, since running requests need some too."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Model name, limits, access and defaults of a server."""

    model_name: str
    adapters: Sequence[str] = ()  # models beside it, of the same weights with adapters
    limits: Limits = Limits()
    keys: Sequence[str] = ()
    media_roots: Sequence[Path] = ()
    remote: RemoteFetcher | None = None
    defaults: SamplingParams = OPENAI_DEFAULTS
    """Sampling parameters for fields that a request leaves out."""


def build_app(service: EngineService, options: ServerOptions) -> FastAPI:
    """Build the application; its lifespan starts and stops the service. `state.chat` is the chat
    endpoint."""
    pool = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="prepare")
    probing = ThreadPoolExecutor(_PROBING_THREADS, thread_name_prefix="probe")
    metrics = Metrics(service)
    media = MediaLoader(
        limits=options.limits, pool=pool, roots=options.media_roots, remote=options.remote
    )
    chat = ChatEndpoint(
        service=service,
        limits=options.limits,
        media=media,
        metrics=metrics,
        pool=pool,
        probing=probing,
        model_name=options.model_name,
        adapters=options.adapters,
        defaults=options.defaults,
        # With a single key the limit per key would only lower the common one.
        has_several_keys=len(set(options.keys)) > 1,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()
        for threads in (pool, probing):
            # A thread may still wait for a decoder process.
            threads.shutdown(wait=False, cancel_futures=True)

    # The pages that document an API load scripts from elsewhere, so there are none.
    # A path with a slash too many is unknown: a redirect would lead where its Host header says.
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.chat = chat
    app.router.routes.append(Route("/v1/chat/completions", endpoint=chat, methods=["POST"]))
    _add_small_paths(app, service=service, chat=chat, metrics=metrics)
    app.add_exception_handler(HTTPException, _http_error)
    if options.keys:
        app.add_middleware(RequireKey, keys=options.keys)
    else:
        app.add_middleware(RefuseForeignPages)
    # Added last, and thereby outermost: it also logs what other middleware rejects.
    app.add_middleware(AccessLog)
    return app


def _add_small_paths(
    app: FastAPI, *, service: EngineService, chat: ChatEndpoint, metrics: Metrics
) -> None:
    page = _PAGE.read_text(encoding="utf-8")
    headers = _page_headers(page)
    models = {
        name: {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "megatron_vita",
            # vLLM's name for the context length, which some clients read.
            "max_model_len": chat.limits.prompt_tokens,
        }
        for name in chat.model_names
    }
    # Load balancers probe with HEAD.
    shown = partial(app.api_route, methods=["GET", "HEAD"])

    @shown("/")
    async def show_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @shown("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": list(models.values())}

    @shown("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        if name not in models:
            raise HTTPException(404, chat.describe_missing_model(name))
        return models[name]

    @shown("/health")
    async def show_health() -> Response:
        status = health(service, chat)
        return JSONResponse(status, status_code=200 if status["status"] == "ok" else 503)

    @shown("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def health(service: EngineService, chat: ChatEndpoint) -> dict[str, Any]:
    """Status of the server and load of the engine, for /health."""
    now = service.statistics
    return {
        "status": _status(service, chat),
        "reason": service.failure,
        "model": chat.model_name,
        "open_requests": chat.open_requests,
        "open_bodies": len(chat.bodies),
        "running": now.running,
        "waiting": now.waiting,
        "step_seconds": round(service.step_seconds(), 3),
    }


def _status(service: EngineService, chat: ChatEndpoint) -> str:
    if service.failure is not None:
        return "failed"
    if chat.draining:
        return "stopping"
    return "ok"


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer unknown paths and methods in OpenAI's error format."""
    assert isinstance(error, HTTPException)
    note(request.scope, refused=error.detail)
    return APIError(str(error.detail), status=error.status_code, headers=error.headers).response()


def _page_headers(page: str) -> dict[str, str]:
    """Headers with a content security policy that allows only the page's own script and style."""
    script, style = (_hash_of(page, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src blob: data:; "
        "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _hash_of(page: str, tag: str) -> str:
    """Hash of the page's only `tag` element, as a content security policy names it."""
    [text] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
