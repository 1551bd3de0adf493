"""Requests of tests that wait in threads, and engines that take long."""

import threading
from typing import Any

from megatron_vita.inference.server.service.service import RequestStream
from tests.inference.server.fake_engine import FakeEngine

LONG = "x" * 4000


def slow(**fields: Any) -> FakeEngine:
    """Answers take minutes."""
    return FakeEngine(reply=LONG, step_seconds=0.02, **fields)


def in_thread(work: Any) -> Any:
    """Starts `work`; the returned function waits for its result, in a list."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def result() -> list[Any]:
        thread.join(30)
        return results

    return result


async def read_all(stream: RequestStream) -> None:
    """Read a stream to its end."""
    async for _ in stream:
        pass
