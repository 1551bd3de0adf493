"""Each request has one line in the log, whatever became of it."""

import hashlib
import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import RunningServer, body, running, wait_until

KEY = "secret"
PREFIX = hashlib.sha256(KEY.encode()).hexdigest()[:8]
HEADERS = {"authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"
Lines = Callable[[int], list[str]]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running(FakeEngine(), keys=[KEY]) as server:
        yield server


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Waits for so many lines, and gives all that there are."""
    caplog.set_level(logging.INFO)

    def ours() -> list[str]:
        records = list(caplog.records)
        return [r.getMessage() for r in records if r.name.startswith("megatron_vita")]

    def found(number: int) -> list[str]:
        wait_until(lambda: len(ours()) >= number)
        return ours()

    return found


def ask(server: RunningServer, **fields: Any) -> int:
    return server.client.post(CHAT, json=body(**fields), headers=HEADERS).status_code


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_a_line_with_its_tokens(
    server: RunningServer, lines: Lines, stream: bool
) -> None:
    assert ask(server, stream=stream) == 200
    [line] = lines(1)
    assert line.startswith(f"127.0.0.1 key={PREFIX} POST {CHAT} 200 ")
    assert "ms prompt=5 cached=3 completion=5 first_ms=" in line
    assert KEY not in line


def test_a_refusal_has_a_line_with_its_reason(server: RunningServer, lines: Lines) -> None:
    assert ask(server, tools=[{"name": "x"}]) == 400
    assert ask(server, model="other") == 404
    assert server.client.post(CHAT, json=body()).status_code == 401
    assert server.client.get("/v1/nothing", headers=HEADERS).status_code == 404
    tools, model, key, path = lines(4)
    assert tools.startswith(f"127.0.0.1 key={PREFIX} POST {CHAT} 400 ")
    assert tools.endswith("refused=unsupported_parameter param=tools")
    assert model.endswith("refused=model_not_found param=model")
    assert key.startswith(f"127.0.0.1 key=- POST {CHAT} 401 ")
    assert key.endswith("refused=invalid_api_key")
    assert path.startswith(f"127.0.0.1 key={PREFIX} GET /v1/nothing 404 ")


def test_what_clients_send_cannot_break_a_line(server: RunningServer, lines: Lines) -> None:
    assert ask(server, **{"a\nkey=admin": 1}) == 400
    assert server.client.get("/x%0a10.0.0.1%20key=admin").status_code == 404
    assert server.client.get("/" + "x" * 5000).status_code == 404
    found = lines(3)
    assert all("\n" not in line and len(line) < 500 for line in found)
    assert "GET /x%0a10.0.0.1%20key=admin 404" in found[1]


def test_a_client_that_goes_away_has_a_line(lines: Lines) -> None:
    with running(FakeEngine(reply="x" * 4000, step_seconds=0.02)) as server:
        data = json.dumps(body()).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + data)
            wait_until(lambda: len(server.engine.requests) == 1)
        wait_until(lambda: any(f"POST {CHAT} 499 " in line for line in lines(1)))


def test_what_monitors_ask_has_no_line_as_long_as_all_is_well(
    server: RunningServer, lines: Lines
) -> None:
    for _ in range(3):
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/metrics", headers=HEADERS).status_code == 200
    assert server.client.get("/metrics").status_code == 401
    [line] = lines(1)
    assert " GET /metrics 401 " in line
