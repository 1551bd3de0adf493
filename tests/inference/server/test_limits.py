"""Requests that are too large, too slow or without a key are refused with a reason, while others
are served."""

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_vita.commands import from_arguments
from megatron_vita.errors import ConfigError
from megatron_vita.inference.requests.prompt import MediaFile
from megatron_vita.inference.server.__main__ import parse_arguments
from megatron_vita.inference.server.access import read_keys
from megatron_vita.inference.server.protocol.limits import Limits
from tests.inference.server.fake_engine import FakeEngine, FakeVideo
from tests.inference.server.media_makers import data_url, video
from tests.inference.server.running_server import RunningServer, body, refusal, running, wait_until
from tests.media.video_files import clip

SMALL = Limits(
    body_bytes=2_000_000, prompt_tokens=1000, body_seconds=0.5, media_files=2, output_tokens=50
)


@pytest.fixture(scope="module")
def small() -> Iterator[RunningServer]:
    with running(FakeEngine(max_context=900), limits=SMALL) as server:
        yield server


def test_a_body_that_says_it_is_too_large_is_refused_unread(small: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=5) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000000\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode())
        answer = connection.makefile().read()
    assert " 413 " in answer
    assert "--body-bytes" in answer


def test_an_endless_body_in_chunks_is_cut_off(small: RunningServer) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100_000_000:
            sent += 50_000
            yield b" " * 50_000

    with httpx.Client(base_url=small.url, trust_env=False) as client:
        headers = {"content-type": "application/json"}
        response = client.post("/v1/chat/completions", content=chunks(), headers=headers)
    error = refusal(response, 413)
    assert error["code"] == "body_bytes_exceeded"
    assert small.chat("still here").status_code == 200


def test_a_body_that_comes_too_slowly_is_refused(small: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
        began = time.monotonic()
        assert b" 408 " in connection.recv(4096)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 30_000}],
        [{"role": "user", "content": ""}] * 30_000,
        [1] * 100_000, [""] * 300_000, ["\\"] * 600_000, [[]] * 100_000,
    ],
    ids=["parts", "messages", "numbers", "texts", "slashes", "lists"],
)  # fmt: skip
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(messages: Any) -> None:
    with running(FakeEngine()) as server:
        assert server.error(status=400, messages=messages)["code"] == "too_many_values"


def test_text_is_no_value_for_each_of_its_signs(small: RunningServer) -> None:
    assert small.error('a, "b": [{\\\n' * 50_000, status=400)["code"] == "prompt_tokens_exceeded"


def test_a_text_without_an_end_is_refused_at_once(small: RunningServer) -> None:
    began = time.monotonic()
    response = small.client.post(
        "/v1/chat/completions", content=b'{"a": "' + b',\\"' * 60_000, headers=JSON
    )
    refusal(response, 400)
    assert time.monotonic() - began < 5


def test_headers_have_a_limit_whatever_parsers_are_installed(small: RunningServer) -> None:
    assert issubclass(small.server.config.http.func, H11Protocol)
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: " + b"a" * 100_000)
        assert b" 400 " in connection.recv(4096)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://evil.example:{port}", "null", "http://127.0.0.1:1"]
)
def test_pages_of_other_sites_get_no_answer_where_no_key_is_needed(
    small: RunningServer, origin: str
) -> None:
    small.engine.prompts.clear()
    response = post_from(small, origin.format(port=small.port))
    assert refusal(response, 403)["code"] == "foreign_origin"
    assert small.engine.prompts == []


@pytest.mark.parametrize("keys", [[], ["secret"]])
def test_who_still_sends_when_he_is_refused_reads_why(keys: list[str]) -> None:
    with (
        running(FakeEngine(), keys=keys) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: http://evil.example\r\n"
        connection.sendall(f"{head}content-length: 2000\r\n\r\n".encode())
        for _ in range(2):
            time.sleep(0.2)
            connection.sendall(b"x" * 1000)
        answer = connection.makefile().read()
    assert ('"invalid_api_key"' if keys else '"foreign_origin"') in answer


def test_the_servers_own_page_and_what_is_no_page_get_answers(small: RunningServer) -> None:
    assert post_from(small, small.url).status_code == 200
    assert post_from(small, None).status_code == 200
    for host in ("localhost", "[::1]", "gpu-box"):
        assert (
            post_from(small, f"http://{host}:{small.port}", host=f"{host}:{small.port}").status_code
            == 200
        )


def test_pages_of_other_sites_that_have_a_key_get_answers() -> None:
    with running(FakeEngine(), keys=["secret"]) as server:
        assert (
            post_from(server, "http://evil.example", authorization="Bearer secret").status_code
            == 200
        )


def test_names_that_are_made_to_point_to_this_machine_give_pages_no_answer(
    small: RunningServer,
) -> None:
    for host in ("evil.example", f"evil.example:{small.port}", "127.0.0.1.evil.example", "[", ""):
        assert (
            refusal(post_from(small, f"http://{host}", host=host), 403)["code"] == "foreign_origin"
        )
    assert post_from(small, None, host="evil.example").status_code == 200


def post_from(server: RunningServer, origin: str | None, **headers: str) -> httpx.Response:
    """A question that a page of `origin` sends."""
    headers |= {} if origin is None else {"origin": origin}
    return server.client.post("/v1/chat/completions", json=body(), headers=headers)


def test_text_of_10_megabytes_is_refused_before_it_is_tokenized() -> None:
    with running(FakeEngine()) as server:
        error = server.error("a " * 5_000_000, status=400)
        assert error["code"] == "prompt_tokens_exceeded"
        assert server.engine.prompts == []


def test_a_prompt_of_too_many_tokens_is_refused(small: RunningServer) -> None:
    error = small.error("a" * 1001, status=400)
    assert (error["code"], error["param"]) == ("prompt_tokens_exceeded", "messages")
    assert "1,001" in error["message"]


def test_a_prompt_that_can_never_fit_the_engine_is_refused(small: RunningServer) -> None:
    assert small.error("a" * 950, status=400)["message"] == "the prompt has 950 tokens: 899 fit"


def test_answers_without_a_length_get_the_limit(small: RunningServer) -> None:
    small.chat()
    assert small.engine.samplings[-1].max_new_tokens == 50


def test_too_many_media_are_refused_before_any_is_decoded(small: RunningServer) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}] * 3
    assert small.error(parts, status=400)["code"] == "media_files_exceeded"


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    with running(FakeEngine(), keys=["secret-1", "secret-2"]) as server:
        yield server


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "secret-1", "Basic secret-1", "Bearer", "Bearer secret-1x"]
)
def test_without_a_key_nothing_is_served_but_the_page_and_health(
    guarded: RunningServer, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    for path in ("/v1/models", "/metrics"):
        assert refusal(guarded.client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
    refusal(guarded.client.post("/v1/chat/completions", json=body(), headers=headers), 401)
    assert guarded.engine.prompts == []
    assert guarded.client.get("/health", headers=headers).status_code == 200
    assert guarded.client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("header", ["Bearer secret-1", "Bearer secret-2", "bearer secret-1"])
def test_any_of_the_keys_opens(guarded: RunningServer, header: str) -> None:
    assert guarded.client.get("/v1/models", headers={"authorization": header}).status_code == 200


def test_a_path_that_is_spelled_otherwise_is_guarded_too(guarded: RunningServer) -> None:
    for path in ("/%76%31/models", "//v1/models", "/v1//models", "/V1/models", "/./v1/models"):
        assert guarded.client.get(path).status_code in (401, 404)


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert read_keys(file) == ["one", "two"]
    assert read_keys(None) == []
    monkeypatch.setenv("VITA_API_KEY", "three")
    assert read_keys(None) == ["three"]
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds none"):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "nothing")


def test_every_limit_can_be_set_on_the_command_line() -> None:
    options = [f"--{field.name.replace('_', '-')}=7" for field in dataclasses.fields(Limits)]
    limits = from_arguments(Limits, parse_arguments(["checkpoint", *options]))
    assert set(dataclasses.asdict(limits).values()) == {7}
    assert from_arguments(Limits, parse_arguments(["checkpoint"])) == Limits()


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_a_limit_must_be_positive(value: float) -> None:
    with pytest.raises(ConfigError, match="request_seconds is"):
        Limits(request_seconds=value)


def test_health_tells_what_the_engine_does(small: RunningServer) -> None:
    health = small.client.get("/health").json()
    assert (health["status"], health["reason"], health["model"]) == ("ok", None, "toy")
    assert {"open_requests", "running", "waiting", "step_seconds"} <= set(health)


def test_metrics_count_requests_times_and_tokens() -> None:
    with running(FakeEngine()) as server:
        assert server.chat("abcd").status_code == 200
        server.error(status=400, colour="red")
        lines = server.client.get("/metrics").text.splitlines()
    for line in (
        'vita_requests_total{status="200"} 1.0',
        'vita_requests_total{status="400"} 1.0',
        "vita_time_to_first_token_seconds_count 1.0",
        "vita_request_seconds_count 1.0",
        "vita_completion_tokens_total 4.0",
        "vita_requests_running 0.0",
        "vita_cache_tokens 65536.0",
        "vita_engine_up 1.0",
    ):
        assert line in lines


def test_the_page_runs_its_own_script_and_nothing_else(small: RunningServer) -> None:
    policy = small.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    assert "http" not in policy


def test_a_bad_request_leaves_others_unharmed(small: RunningServer) -> None:
    data = json.dumps(body("x" * 100, stream=True))
    with small.client.stream(
        "POST", "/v1/chat/completions", content=data, headers=JSON
    ) as response:
        refusal(
            httpx.post(
                f"{small.url}/v1/chat/completions", content=b"{", headers=JSON, trust_env=False
            ),
            400,
        )
        assert response.read().endswith(b"data: [DONE]\n\n")


class SlowlyProbed(FakeEngine):
    """Looks at videos until `ready` is set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ready = threading.Event()

    def _video(self, video: MediaFile, max_frames: int) -> FakeVideo:
        self.ready.wait(20)
        return super()._video(video, max_frames)


def test_whoever_sends_text_does_not_wait_for_others_videos_to_be_looked_at() -> None:
    film = video(data_url(clip(frames=2), "video/mp4"))
    with running(SlowlyProbed()) as server, ThreadPoolExecutor(30) as pool:
        answers = [pool.submit(server.chat, film) for _ in range(30)]
        wait_until(lambda: server.client.get("/health").json()["open_requests"] == 30)
        assert (
            server.client.post(
                "/v1/chat/completions", json=body("still here"), timeout=5
            ).status_code
            == 200
        )
        assert not any(answer.done() for answer in answers)
        server.engine.ready.set()
        assert [answer.result().status_code for answer in answers] == [200] * 30


JSON = {"content-type": "application/json"}
