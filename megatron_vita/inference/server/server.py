"""Lifecycle of the server process, until a signal or a failure of the engine ends it."""

import asyncio
import functools
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from megatron_vita.inference.server.app import ServerOptions, build_app
from megatron_vita.inference.server.connections import BoundedConnection, quieten_uvicorn
from megatron_vita.inference.server.service.interface import ServedEngine
from megatron_vita.inference.server.service.service import EngineService

logger = logging.getLogger(__name__)

_LAST_SECONDS = 5
"""Time for clients to read their last bytes after all requests were aborted; longer than ChatEndpoint waits."""
_LOOK_SECONDS = 0.05
_HURRY_SECONDS = 2.0
"""Time for the engine to end after a second SIGINT."""


class VitaServer(uvicorn.Server):
    """A server that shuts down in order: reject new requests, drain open ones, then close the
    engine."""

    def __init__(
        self, engine: ServedEngine, options: ServerOptions, *, host: str, port: int
    ) -> None:
        self.service = EngineService(engine, on_failure=self._on_failure)
        app = build_app(self.service, options)
        self._chat = app.state.chat
        self._drain_seconds = options.limits.drain_seconds
        self._hurry: Callable[[], object] = lambda: None
        quieten_uvicorn()
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=functools.partial(  # type: ignore[arg-type]
                    BoundedConnection, header_seconds=options.limits.header_seconds
                ),
                # Logging is set up before, and AccessLog writes the lines of requests.
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                # By then all answers are finished or cut off: only their last bytes are left.
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._chat.draining = True
        if self._chat.open_requests:
            logger.info(
                "stopping: %d open requests get %g s", self._chat.open_requests, self._drain_seconds
            )
        loop = asyncio.get_running_loop()
        # A signal handler runs between two bytecodes of whatever the loop is doing.
        self._hurry = lambda: loop.call_soon_threadsafe(self._chat.cut_off)
        # Requests that are still open after draining are cut off.
        loop.call_later(0 if self.force_exit else self._drain_seconds, self._chat.cut_off)
        await self._drain()
        await super().shutdown(sockets)
        if self.force_exit:  # then uvicorn leaves out the end of the application
            await self.service.stop(seconds=_HURRY_SECONDS)

    async def _drain(self) -> None:
        """Keep listening while requests are open, so that new clients and /health get the answer
        that the server is stopping."""
        latest = time.monotonic() + self._drain_seconds + _LAST_SECONDS
        while self._chat.is_busy and not self.force_exit and time.monotonic() < latest:
            await asyncio.sleep(_LOOK_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn. A second signal ends open requests at once."""
        super().handle_exit(sig, frame)
        if self.force_exit:
            self._hurry()

    def _on_failure(self) -> None:
        logger.critical("the server ends because %s", self.service.failure)
        self._chat.cut_off()
        # uvicorn looks at this flag in its main loop.
        self.should_exit = True


def serve(engine: ServedEngine, options: ServerOptions, *, host: str, port: int) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine fails.

    Returns:
        The exit code: 1 if the engine failed or did not end in time, otherwise 0.
    """
    server = VitaServer(engine, options, host=host, port=port)
    if threading.current_thread() is threading.main_thread():
        # After an orderly end uvicorn raises again the signals that it got: they have done their
        # work.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    server.run()
    if server.service.failure is not None:
        return 1
    # The engine may hang in a step; the process must end all the same.
    if server.service.is_running:
        logger.critical(
            "the server ends before its engine, whose step has taken %.0f s",
            server.service.step_seconds(),
        )
        return 1
    logger.info("the server has stopped")
    return 0
