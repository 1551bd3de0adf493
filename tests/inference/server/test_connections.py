"""Connections that send little, slowly or nonsense cost others nothing."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from megatron_vita.inference.server import connections
from megatron_vita.inference.server.access_log import LineBudget
from megatron_vita.inference.server.protocol.limits import Limits
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import RunningServer, body, refusal, running, wait_until

BODY = json.dumps(body(max_tokens=1)).encode()
FEW = Limits(open_requests=2, open_bodies=4, header_seconds=0.4)


@pytest.fixture(scope="module")
def few() -> Iterator[RunningServer]:
    with running(FakeEngine(), limits=FEW) as server:
        yield server


def connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def half_a_body(stack: ExitStack, server: RunningServer, key: str = "") -> socket.socket:
    """A connection whose body has come but for its last byte."""
    before = reading(server)
    connection = stack.enter_context(connect(server))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n"
    head += f"authorization: Bearer {key}\r\nconnection: close\r\n"
    connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + BODY[:-1])
    wait_until(lambda: reading(server) != before or before == FEW.open_bodies)
    return connection


def reading(server: RunningServer) -> int:
    return int(server.client.get("/health").json()["open_bodies"])


def rest_of(connection: socket.socket) -> str:
    return connection.makefile().read()


def test_half_bodies_are_no_open_requests(few: RunningServer) -> None:
    with ExitStack() as stack:
        halves = [half_a_body(stack, few) for _ in range(4)]
        assert few.client.get("/health").json()["open_requests"] == 0
        assert few.chat(max_tokens=1).status_code == 200  # takes the place of the oldest
        assert " 408 " in rest_of(halves[0])
        for half in halves[1:]:
            half.sendall(BODY[-1:])
            assert " 200 " in rest_of(half)


def test_the_client_with_most_bodies_loses_its_oldest() -> None:
    with running(FakeEngine(), keys=["ann", "bob"], limits=FEW) as server, ExitStack() as stack:
        bobs = half_a_body(stack, server, "bob")
        anns = [half_a_body(stack, server, "ann") for _ in range(4)]
        answer = rest_of(anns[0])
        assert " 408 " in answer
        assert "--open-bodies" in answer
        bobs.sendall(BODY[-1:])
        assert " 200 " in rest_of(bobs)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_headers_must_come_in_time(few: RunningServer, sent: bytes) -> None:
    with connect(few) as connection:
        connection.sendall(sent)
        began = time.monotonic()
        assert connection.recv(100) == b""
        assert time.monotonic() - began < 5


def test_headers_that_drip_are_cut_off(few: RunningServer) -> None:
    with connect(few) as connection:
        began = time.monotonic()
        with suppress(OSError):  # a pipe that is broken, or a reset
            for _ in range(200):
                connection.sendall(b"G")
                time.sleep(0.05)
        assert time.monotonic() - began < 5


def test_headers_of_a_later_request_must_come_in_time_too(few: RunningServer) -> None:
    with connect(few) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b" 200 " in connection.recv(4096)
        connection.sendall(b"GET /health")
        while connection.recv(4096):
            pass


def test_bodies_and_answers_have_more_time_than_headers() -> None:
    engine = FakeEngine(reply="abcd", step_seconds=0.2)
    with running(engine, limits=FEW) as server, ExitStack() as stack:
        half = half_a_body(stack, server)
        time.sleep(0.6)
        half.sendall(BODY[-1:])
        assert " 200 " in rest_of(half)
        assert server.chat().status_code == 200


def test_a_flood_of_what_is_no_http_has_few_lines_that_name_its_sender(
    few: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "_INVALID", LineBudget(3, seconds=60))
    with caplog.at_level(logging.INFO):
        for _ in range(12):
            with connect(few) as connection:
                connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
                assert b" 400 " in connection.recv(4096)
        upgrade = {"connection": "upgrade", "upgrade": "websocket"}
        assert few.client.get("/v1/models", headers=upgrade).status_code == 200
    loud = ("megatron_vita", "uvicorn.error")
    lines = [r.getMessage() for r in caplog.records if r.name.startswith(loud)]
    assert len([line for line in lines if "invalid_http" in line]) == 3
    assert [line for line in lines if not line.startswith("127.0.0.1 ")] == []


def test_lines_that_were_left_out_are_counted() -> None:
    budget = LineBudget(2, seconds=0.05)
    assert [budget.take() for _ in range(5)] == [0, 0, None, None, None]
    time.sleep(0.06)
    assert [budget.take(), budget.take()] == [3, 0]


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/toy"])
def test_head_is_answered_like_get_without_a_body(few: RunningServer, path: str) -> None:
    response = few.client.head(path)
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("path", ["/health/", "/v1/chat/completions/", "/v1/models/toy/"])
def test_a_slash_too_many_leads_nowhere(few: RunningServer, path: str) -> None:
    for method in ("GET", "POST"):
        response = few.client.request(method, path, headers={"host": "evil.example"})
        assert response.status_code in (404, 405)
        assert "location" not in response.headers
        refusal(response, response.status_code)
