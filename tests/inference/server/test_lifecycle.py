"""Requests end: at a disconnect, a deadline, the server's end, or the engine's; and nothing is left
of them."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from megatron_vita.errors import DataError
from megatron_vita.inference.requests.prompt import Prompt
from megatron_vita.inference.requests.types import SamplingParams
from megatron_vita.inference.server.protocol.limits import Limits
from megatron_vita.inference.server.service.service import EngineService
from tests.inference.server.clients import LONG, in_thread, read_all, slow
from tests.inference.server.fake_engine import FakeEngine, FakePrepared
from tests.inference.server.running_server import RunningServer, body, refusal, running, wait_until


def is_empty(server: RunningServer) -> bool:
    return not server.engine.requests and server.client.get("/health").json()["open_requests"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels_the_request(stream: bool) -> None:
    with running(slow()) as server:
        data = json.dumps(body(stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
            )
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
            wait_until(lambda: len(server.engine.requests) == 1)
        wait_until(lambda: server.engine.cancelled == [0])
        wait_until(lambda: is_empty(server))
        assert server.engine.forgotten == [0]
        assert 'vita_requests_total{status="499"} 1.0' in server.client.get("/metrics").text


def test_a_stream_that_is_closed_early_is_cancelled() -> None:
    with running(slow()) as server:
        with server.client.stream(
            "POST", "/v1/chat/completions", json=body(stream=True)
        ) as response:
            next(response.iter_lines())
        wait_until(lambda: is_empty(server))


def test_pieces_are_sent_as_they_come() -> None:
    with running(FakeEngine(reply="abcd", step_seconds=0.2)) as server:
        with server.client.stream(
            "POST", "/v1/chat/completions", json=body(stream=True)
        ) as response:
            times = [
                time.monotonic() for line in response.iter_lines() if line.startswith("data: {")
            ]
        assert times[-1] - times[1] > 0.4


def test_a_request_past_its_deadline_is_ended_with_504() -> None:
    with running(slow(), limits=Limits(request_seconds=0.3)) as server:
        response = server.chat()
        assert refusal(response, 504)["code"] == "request_seconds_exceeded"
        assert response.headers["x-should-retry"] == "false"
        wait_until(lambda: is_empty(server))


def test_a_stream_past_its_deadline_ends_with_an_error() -> None:
    with running(slow(), limits=Limits(request_seconds=0.3)) as server:
        last = server.chat(stream=True).text.strip().split("\n\n")[-1]
        assert (
            json.loads(last.removeprefix("data: "))["error"]["code"] == "request_seconds_exceeded"
        )
        wait_until(lambda: is_empty(server))


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vita.inference.server.completions._FAREWELL_SECONDS", 0.2)
    engine = FakeEngine(reply="y" * 30_000)
    with running(engine, limits=Limits(request_seconds=1.5, output_tokens=30_000)) as server:
        data = json.dumps(body(stream=True, n=8, logprobs=True, top_logprobs=20)).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
            )
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
            wait_until(lambda: len(engine.requests) == 1)
            wait_until(lambda: is_empty(server))


def test_a_silent_stream_gets_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vita.inference.server.completions.KEEP_ALIVE_SECONDS", 0.05)
    with running(FakeEngine(reply="ab", step_seconds=0.3)) as server:
        assert ": waiting\n\n" in server.chat(stream=True).text


def test_more_requests_than_the_limit_get_429() -> None:
    with running(slow(), limits=Limits(open_requests=2)) as server:
        streams = [
            server.client.stream("POST", "/v1/chat/completions", json=body(stream=True))
            for _ in range(2)
        ]
        for stream in streams:
            stream.__enter__()
        response = server.chat()
        error = refusal(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "open_requests_exceeded")
        assert int(response.headers["retry-after"]) > 0
        for stream in streams:
            stream.__exit__(None, None, None)
        wait_until(lambda: is_empty(server))
        assert server.chat(max_tokens=1).status_code == 200


def test_media_that_cannot_be_decoded_end_the_request_alone() -> None:
    with running(FakeEngine(decode_error="messages[0].content[0]: broken")) as server:
        assert server.error(status=400)["message"] == "messages[0].content[0]: broken"
        assert '"error":' in server.chat(stream=True).text
        assert is_empty(server)


def test_logits_that_are_no_numbers_are_the_servers_fault() -> None:
    with running(
        FakeEngine(decode_error="the logits are NaN", error_finish="model_error")
    ) as server:
        error = server.error(status=500)
        assert (error["message"], error["type"], error["code"]) == (
            "the logits are NaN",
            "server_error",
            "model_error",
        )
        assert is_empty(server)


def test_an_idle_engine_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vita.inference.server.service.service.IDLE_SECONDS", 0.02)
    with running(FakeEngine()) as server:
        wait_until(lambda: server.engine.idles > 2)


def test_the_engine_is_closed_when_the_server_stops() -> None:
    with running(FakeEngine()) as server:
        assert server.chat().status_code == 200
    assert server.engine.closed


def test_open_requests_may_end_while_the_server_stops_and_new_ones_are_refused() -> None:
    with running(FakeEngine(reply="z" * 50, step_seconds=0.02)) as server:
        answers = in_thread(lambda: server.chat())
        wait_until(lambda: len(server.engine.requests) == 1)
        with httpx.Client(base_url=server.url, trust_env=False) as other:
            assert other.get("/health").status_code == 200
            server.server.should_exit = True
            wait_until(lambda: server.server.service is not None and server.server._chat.draining)
            assert_refused_or_closed(other)
        assert answers()[0].json()["choices"][0]["message"]["content"] == "z" * 50


def test_who_comes_while_open_requests_end_reads_that_the_server_stops() -> None:
    with running(FakeEngine(reply="z" * 100, step_seconds=0.02)) as server:
        answers = in_thread(lambda: server.chat())
        wait_until(lambda: len(server.engine.requests) == 1)
        server.server.should_exit = True
        wait_until(lambda: server.server._chat.draining)
        for _ in range(2):  # each on a connection of its own
            with httpx.Client(base_url=server.url, trust_env=False) as other:
                health = other.get("/health")
                assert (health.status_code, health.json()["status"]) == (503, "stopping")
                refused = other.post("/v1/chat/completions", json=body())
                assert refusal(refused, 503)["code"] == "stopping"
        assert answers()[0].json()["choices"][0]["message"]["content"] == "z" * 100


def assert_refused_or_closed(client: httpx.Client) -> None:
    try:
        refusal(client.post("/v1/chat/completions", json=body()), 503)
    except httpx.TransportError:
        return


def test_answers_that_take_too_long_are_cut_off_when_the_server_stops() -> None:
    with running(slow(), limits=Limits(drain_seconds=0.3)) as server:
        answers = in_thread(lambda: server.chat())
        wait_until(lambda: len(server.engine.requests) == 1)
        server.server.should_exit = True
        assert refusal(answers()[0], 503)["code"] == "stopping"
    assert server.engine.closed


def test_answers_are_cut_off_in_time_also_where_a_step_of_the_engine_takes_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_vita.inference.server.server._LAST_SECONDS", 1)
    engine = FakeEngine(reply=LONG, step_seconds=4)
    with running(engine, limits=Limits(drain_seconds=0.3)) as server:
        answers = in_thread(lambda: server.chat())
        wait_until(lambda: server.server.service.step_seconds() > 0)
        server.server.should_exit = True
        assert refusal(answers()[0], 503)["code"] == "stopping"
    assert engine.closed


class SlowlyPrepared(FakeEngine):
    """Looks at a prompt until `ready` is set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ready = threading.Event()

    def prepare(self, prompt: Prompt, **options: Any) -> Any:
        prepared = super().prepare(prompt, **options)
        self.ready.wait(10)
        return prepared


def test_requests_that_are_still_prepared_when_the_time_to_end_is_over_get_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_vita.inference.server.server._LAST_SECONDS", 1)
    engine = SlowlyPrepared(reply=LONG, step_seconds=0.02)
    with running(engine, limits=Limits(drain_seconds=0.3)) as server:
        answers = in_thread(lambda: server.chat())
        wait_until(lambda: len(engine.prompts) == 1)
        server.server.should_exit = True
        assert refusal(answers()[0], 503)["code"] == "stopping"
        engine.ready.set()
    assert engine.closed
    assert engine.samplings == []


def test_bodies_that_are_still_read_when_the_time_to_end_is_over_get_503() -> None:
    with (
        running(FakeEngine(), limits=Limits(drain_seconds=0.3)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection,
    ):
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
        wait_until(lambda: server.client.get("/health").json()["open_bodies"] == 1)
        server.server.should_exit = True
        answer = connection.makefile().read()
    assert " 503 " in answer
    assert '"stopping"' in answer


class SlowToRefuse(FakeEngine):
    """Takes longer to refuse a prompt than it takes to send the next one."""

    def add(self, prepared: FakePrepared, sampling: SamplingParams) -> int:
        if prepared.text == "bad":
            time.sleep(0.002)
            raise DataError("a bad prompt")
        return super().add(prepared, sampling)


def under_refusals(engine: FakeEngine, work: Callable[[EngineService], Awaitable[None]]) -> None:
    """Does `work` with a service that has always bad prompts to refuse."""
    service = EngineService(engine)

    async def refused() -> None:
        while True:
            with pytest.raises(DataError):
                await service.submit(engine.prepare(Prompt.ask("bad")), SamplingParams())

    async def main() -> None:
        service.start()
        senders = [asyncio.create_task(refused()) for _ in range(16)]
        try:
            await asyncio.wait_for(work(service), 5)
        finally:
            for sender in senders:
                sender.cancel()
            await asyncio.wait(senders)
            await service.stop()

    asyncio.run(main())


def test_answers_go_on_under_a_steady_stream_of_refused_requests() -> None:
    engine = SlowToRefuse(reply="abc")

    async def answer(service: EngineService) -> None:
        await read_all(
            await service.submit(
                engine.prepare(Prompt.ask("good")), SamplingParams(max_new_tokens=3)
            )
        )

    under_refusals(engine, answer)


def test_other_ranks_hear_of_the_first_under_a_steady_stream_of_refused_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("megatron_vita.inference.server.service.service.IDLE_SECONDS", 0.02)
    engine = SlowToRefuse()

    async def idle(_: EngineService) -> None:
        await asyncio.to_thread(wait_until, lambda: engine.idles > 2, 4)

    under_refusals(engine, idle)
