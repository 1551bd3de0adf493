"""An engine that fails or loses a rank ends all requests with its reason, and the server."""

import asyncio
import json
import socket
import threading
import time

import pytest

from megatron_vita.errors import EngineError
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.inference.server.service.service import EngineFailedError, EngineService
from tests.inference.server.clients import LONG, in_thread, read_all, slow
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import refusal, running, wait_until


def test_when_the_engine_fails_all_requests_get_503_with_the_reason() -> None:
    with running(slow(fails_after=20)) as server:
        answers = [in_thread(lambda s=s: server.chat(stream=s)) for s in (False, True)]
        plain, stream = (answer()[0] for answer in answers)
        assert "rank 1 is gone" in refusal(plain, 503)["message"]
        last = stream.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        wait_until(lambda: server.server.service.failure is not None)
    assert "rank 1 is gone" in (server.server.service.failure or "")


def test_a_rank_lost_inside_a_kernel_ends_all_requests_with_503_and_the_server() -> None:
    engine = slow()
    with running(engine) as server:
        open_requests = [in_thread(lambda s=s: server.chat(stream=s)) for s in (False, True)]
        wait_until(lambda: len(engine.requests) == 2)
        engine.step_seconds = 120
        time.sleep(0.1)
        waiting = in_thread(server.chat)  # the engine's thread does not look for it
        wait_until(lambda: server.client.get("/health").json()["open_requests"] == 3)
        engine.tell_loss(EngineError("a rank is gone: rank 1"))
        plain, stream, late = (answer()[0] for answer in (*open_requests, waiting))
        for answer in (plain, late):
            assert "EngineError: a rank is gone: rank 1" in refusal(answer, 503)["message"]
        last = stream.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        wait_until(lambda: server.server.should_exit)
        began = time.monotonic()
    assert time.monotonic() - began < 5


def test_when_a_rank_is_lost_bodies_that_are_still_read_get_503_with_the_reason() -> None:
    engine = FakeEngine()
    with (
        running(engine) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
        wait_until(lambda: server.client.get("/health").json()["open_bodies"] == 1)
        began = time.monotonic()
        engine.tell_loss(EngineError("a rank is gone: rank 1"))
        answer = connection.makefile().read()
    assert time.monotonic() - began < 8
    assert " 503 " in answer
    assert '"engine_failed"' in answer


def test_when_a_rank_is_lost_while_the_server_stops_the_engine_is_waited_for_no_longer() -> None:
    engine = FakeEngine(step_seconds=60)
    service = EngineService(engine)

    async def stop() -> None:
        service.start()
        await service.submit(engine.prepare(Prompt.ask("hello")), SamplingParams())
        asyncio.get_running_loop().call_later(
            0.3, engine.tell_loss, EngineError("a rank is gone: rank 1")
        )
        await asyncio.wait_for(service.stop(), 5)

    asyncio.run(stop())
    assert "rank 1" in (service.failure or "")


@pytest.mark.parametrize("fails", [True, False])
def test_a_client_that_left_before_its_request_was_added_does_not_hide_the_end_of_the_engine(
    fails: bool,
) -> None:
    engine = FakeEngine(reply=LONG, step_seconds=0.5, fails_after=1 if fails else None)
    told = threading.Event()
    service = EngineService(engine, on_failure=told.set)

    async def leave_early() -> None:
        service.start()
        stream = await service.submit(
            engine.prepare(Prompt.ask("hello")), SamplingParams(max_new_tokens=4000)
        )
        await asyncio.to_thread(wait_until, lambda: engine.steps == 1)
        leaving = asyncio.create_task(
            service.submit(engine.prepare(Prompt.ask("bye")), SamplingParams())
        )
        await asyncio.sleep(0.1)
        leaving.cancel()
        if not fails:
            await service.stop()
        with pytest.raises(EngineFailedError, match="rank 1 is gone" if fails else "is stopping"):
            await asyncio.wait_for(read_all(stream), 5)
        if fails:
            await asyncio.to_thread(told.wait, 5)

    asyncio.run(leave_early())
    assert told.is_set() == fails
    assert engine.closed != fails
    assert bool(service.failure) == fails
