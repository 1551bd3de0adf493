"""Keys are kept apart: nobody learns what others ask, and nobody takes all the room."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from megatron_vita.inference.server.protocol.limits import Limits
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import RunningServer, body, refusal, running, wait_until

FEW = Limits(open_requests=5, open_requests_per_key=2)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def ask(server: RunningServer, key: str | None, **fields: Any) -> httpx.Response:
    headers = {} if key is None else bearer(key)
    return server.client.post("/v1/chat/completions", json=body(**fields), headers=headers)


def salt(server: RunningServer, key: str | None, **fields: Any) -> bytes:
    """The salt of a question as the engine gets it."""
    assert ask(server, key, **fields).status_code == 200
    found: bytes = server.engine.prompts[-1].cache_salt
    return found


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with running(FakeEngine(), keys=["ann", "bob"], limits=FEW) as server:
        yield server


def test_each_key_and_each_salt_has_a_cache_of_its_own(keyed: RunningServer) -> None:
    salts = [
        salt(keyed, key, cache_salt=value)
        for key in ("ann", "bob")
        for value in (None, "x", "y", "ann", "bob")
    ]
    assert len(set(salts)) == len(salts)
    assert all(len(value) == 32 for value in salts)
    assert salt(keyed, "ann", cache_salt="x") == salts[1]


def test_without_keys_all_share_but_those_with_a_salt(echo: RunningServer) -> None:
    assert salt(echo, None) == salt(echo, "whoever") == b""
    assert salt(echo, None, cache_salt="x") == salt(echo, None, cache_salt="x") != b""
    assert salt(echo, None, cache_salt="x") != salt(echo, None, cache_salt="y")


def open_streams(stack: ExitStack, server: RunningServer, key: str, number: int) -> None:
    """Begin answers that take minutes, and leave them open."""
    for _ in range(number):
        stream = server.client.stream(
            "POST", "/v1/chat/completions", json=body(stream=True), headers=bearer(key)
        )
        assert stack.enter_context(stream).status_code == 200


def slow() -> FakeEngine:
    return FakeEngine(reply="x" * 4000, step_seconds=0.02)


def test_a_key_has_a_limit_of_open_requests_and_leaves_room_to_others() -> None:
    with running(slow(), keys=["ann", "bob"], limits=FEW) as server, ExitStack() as stack:
        open_streams(stack, server, "ann", 2)
        response = ask(server, "ann")
        error = refusal(response, 429)
        assert error["code"] == "open_requests_per_key_exceeded"
        assert "--open-requests-per-key" in error["message"]
        assert int(response.headers["retry-after"]) > 0
        assert ask(server, "bob", max_tokens=1).status_code == 200
        stack.close()
        wait_until(lambda: server.client.get("/health").json()["open_requests"] == 0)
        assert ask(server, "ann", max_tokens=1).status_code == 200


def test_the_only_key_may_take_all_the_room() -> None:
    with running(slow(), keys=["ann"], limits=FEW) as server, ExitStack() as stack:
        open_streams(stack, server, "ann", 5)
        assert refusal(ask(server, "ann"), 429)["code"] == "open_requests_exceeded"
