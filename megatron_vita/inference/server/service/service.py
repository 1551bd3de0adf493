"""The thread that owns the engine, and its bridge to the event loop.

All calls of the engine but `prepare` are made by one thread, which takes commands between steps.
Output deltas go to the event loop, where each request reads its own. If the engine raises or
reports a lost rank, the service has failed for good: every request, open or new, gets
EngineFailedError.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.inference.requests.types import OutputDelta, SamplingParams
from megatron_vita.inference.server.service.interface import ServedEngine, Statistics, Usage

logger = logging.getLogger(__name__)

IDLE_SECONDS = 2.0
"""Idle time before an empty step is sent: without one, worker ranks would assume that rank 0 has died."""
TURN_SECONDS = 0.05
"""Time limit for taking commands between two steps, so that many new requests do not delay running ones."""
_LOOK_SECONDS = 0.02
"""Interval for checking whether the engine has ended."""


class EngineFailedError(VitaError):
    """The engine has failed or is closed."""


@dataclass(eq=False)
class RequestStream:
    """Output deltas of one request, read on the event loop. `usage` is set once the last one has
    come."""

    choices: int
    usage: Usage | None = None
    number: int | None = None  # the engine's; of the engine's thread
    left: int = 0  # unfinished answers; used by the engine's thread
    arrivals: asyncio.Queue[OutputDelta | EngineFailedError] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        left = self.choices
        while left:
            arrival = await self.arrivals.get()
            if isinstance(arrival, EngineFailedError):
                raise arrival
            if arrival.finish is not None:
                left -= 1
            yield arrival


class EngineService:
    """Runs an engine in a thread of its own."""

    def __init__(
        self, engine: ServedEngine, *, on_failure: Callable[[], None] = lambda: None
    ) -> None:
        """`on_failure` is called on the event loop when the engine has failed."""
        self.engine = engine
        self.failure: str | None = None
        self.statistics: Statistics = engine.statistics()
        self.on_failure = on_failure
        self._step_began: float | None = None
        self._used = time.monotonic()  # when the engine last did something; of its thread
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # no command may come after the last look for commands
        self._ended: EngineFailedError | None = None
        self._stopping = False
        self._open: dict[int, RequestStream] = {}  # of the engine's thread
        # A daemon: a step that hangs in a kernel must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; outputs are delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        # Called by the monitor's thread, since the engine's own may be waiting for the lost rank.
        self.engine.on_lost_rank(self._fail)

    async def submit(self, prepared: Any, sampling: SamplingParams) -> RequestStream:
        """Add a request to the engine.

        Raises:
            DataError: the request can never fit.
            EngineFailedError: the engine has ended.
        """
        stream = RequestStream(sampling.n)
        added: Future[None] = Future()
        self._command(lambda: self._add(stream, prepared, sampling, added))
        try:
            await asyncio.wrap_future(added)
        except asyncio.CancelledError:
            # The command may have been queued already, and the client is gone.
            self.cancel(stream)
            raise
        return stream

    def cancel(self, stream: RequestStream) -> None:
        """Cancel a request; one that has ended is left alone."""
        try:
            self._command(lambda: self._cancel(stream))
        except EngineFailedError:
            return  # then the request has ended, too

    async def stop(self, *, seconds: float = 30.0) -> None:
        """Close the engine after its current step; wait for that at most `seconds`, or until it
        fails."""
        self._stopping = True
        # Wakes the thread if it waits for a command.
        self._commands.put(lambda: None)
        ends = time.monotonic() + seconds
        while self.is_running and self.failure is None and time.monotonic() < ends:
            await asyncio.sleep(_LOOK_SECONDS)
        if self.is_running and self.failure is None:
            logger.warning("the engine did not end within %g seconds", seconds)

    @property
    def is_running(self) -> bool:
        """True until the engine's thread ends."""
        return self._thread.is_alive()

    def step_seconds(self) -> float:
        """Duration of the current step so far; 0 between steps."""
        began = self._step_began
        if began is None:
            return 0.0
        return time.monotonic() - began

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._ended is not None:
                raise self._ended
            self._commands.put(command)

    def _run(self) -> None:
        try:
            while not self._stopping and self._ended is None:
                self._take_commands()
                if self.engine.has_work:
                    self._step()
                elif time.monotonic() - self._used >= IDLE_SECONDS:
                    self.engine.idle()
                    self._used = time.monotonic()
            if self._ended is None:
                self.engine.close()
                self._end("the server is stopping")
        # whatever it is: without this thread nobody would get an answer
        except BaseException as error:
            logger.exception("the engine failed; the server ends")
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End the service after a failure; the first failure is the reported one. Called by the
        engine's thread, or by the one that detects a lost rank."""
        reason = f"the engine failed: {type(error).__name__}: {error}"
        with self._lock:
            # Two threads may fail at the same time, and only one callback must run.
            is_first = self.failure is None
            self.failure = self.failure or reason
        try:
            self._end(self.failure)
        finally:
            if is_first:
                self._loop.call_soon_threadsafe(self.on_failure)

    def _take_commands(self) -> None:
        """Run queued commands for a bounded time; an idle engine waits for the next one."""
        idle_at = self._used + IDLE_SECONDS
        timeout = 0.0 if self.engine.has_work else max(idle_at - time.monotonic(), 0.0)
        try:
            command = self._commands.get(timeout=timeout)
        except queue.Empty:
            return
        command()
        # A flood of commands must not keep the engine from its next step.
        ends = time.monotonic() + TURN_SECONDS
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < ends:
                self._commands.get_nowait()()

    def _step(self) -> None:
        self._step_began = time.monotonic()
        deltas = self.engine.step()
        self._step_began = None
        self._used = time.monotonic()
        arrivals = [
            (self._open[p.request], p, self._settle(p)) for p in deltas if p.request in self._open
        ]
        # A snapshot: other threads read it at any time.
        self.statistics = self.engine.statistics()
        if arrivals:
            # One call for all outputs of a step; asyncio queues may be used on their loop only.
            self._loop.call_soon_threadsafe(_deliver, arrivals)

    def _settle(self, delta: OutputDelta) -> Usage | None:
        """Forget a request whose last choice has finished, and return its usage."""
        stream = self._open[delta.request]
        if delta.finish is not None:
            stream.left -= 1
        if stream.left:
            return None
        del self._open[delta.request]
        usage = self.engine.usage(delta.request)
        self.engine.forget(delta.request)
        return usage

    def _add(
        self, stream: RequestStream, prepared: Any, sampling: SamplingParams, added: "Future[None]"
    ) -> None:
        if not added.set_running_or_notify_cancel():
            return  # its client has gone
        if self._ended is not None:
            added.set_exception(self._ended)
            return
        try:
            stream.number = self.engine.add(prepared, sampling)
        except (DataError, ConfigError) as error:  # the request's fault; all else is the engine's
            added.set_exception(error)
            return
        except BaseException as error:
            added.set_exception(
                EngineFailedError(f"the engine failed: {type(error).__name__}: {error}")
            )
            raise
        stream.left = stream.choices
        self._open[stream.number] = stream
        added.set_result(None)
        # since the look above: by another thread, which did not see this request
        if self._ended is not None:
            self._loop.call_soon_threadsafe(stream.arrivals.put_nowait, self._ended)

    def _cancel(self, stream: RequestStream) -> None:
        if stream.number in self._open and self._ended is None:
            self.engine.cancel(stream.number)

    def _end(self, reason: str) -> None:
        """Reject commands from now on and end open requests. Any thread may call it, repeatedly."""
        with self._lock:
            self._ended = self._ended or EngineFailedError(reason)
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()
        for stream in list(self._open.values()):
            self._loop.call_soon_threadsafe(stream.arrivals.put_nowait, self._ended)


def _deliver(arrivals: list[tuple[RequestStream, OutputDelta, Usage | None]]) -> None:
    for stream, delta, usage in arrivals:
        stream.usage = usage or stream.usage
        stream.arrivals.put_nowait(delta)
