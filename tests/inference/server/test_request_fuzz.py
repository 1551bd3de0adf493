"""2,000 requests of all shapes: right ones are answered, others are refused with a documented
reason, and the server is afterwards as it was."""

import gc
import json
import logging
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_vita import platform
from megatron_vita.inference.server.protocol.limits import Limits
from tests.inference.server.request_fuzzer import Case, RequestFuzzer
from tests.inference.server.running_server import RunningServer, body, running, wait_until
from tests.inference.tiny import tiny_engine
from tests.scale import scaled

REQUESTS = scaled(200, full=2000)
SEED = 15
CLIENTS = 4
DOCS = Path(__file__).parents[3] / "docs" / "serving.md"
BODY_FAULTS = ("invalid_json", "too_many_values")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    platform.initialize_process()
    engine = tiny_engine(
        tmp_path_factory.mktemp("engine"), max_context=1024, cache_tokens=16_384, chunk_tokens=512
    )
    with running(engine, limits=Limits(output_tokens=6)) as server:
        yield server


def send(client: httpx.Client, case: Case) -> str:
    """Describe what is wrong with the response; empty if nothing is."""
    data = json.dumps(case.body).encode()
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=data, headers=headers)
    fault = _fault(case, response)
    if fault:
        return f"{fault}: {response.status_code} {response.text[:300]} to {data[:2000]!r}"
    return ""


def _fault(case: Case, response: httpx.Response) -> str:
    if response.status_code == 200:
        if _is_whole(case.body, response):
            return ""
        return "not whole"
    if case.is_plain:
        return "refused"
    if response.status_code not in (400, 404):
        return "neither answered nor refused"
    return _fault_of_refusal(case.body, response.json()["error"])


def _is_whole(asked: dict[str, Any], response: httpx.Response) -> bool:
    if asked.get("stream"):
        return response.text.endswith("data: [DONE]\n\n")
    answer = response.json()
    ends = {choice["finish_reason"] for choice in answer["choices"]}
    return len(answer["choices"]) == (asked.get("n") or 1) and ends <= {"stop", "length"}


def _fault_of_refusal(asked: Any, error: dict[str, Any]) -> str:
    """Check that the reason is documented, and names a field that the request has or lacks."""
    if f"`{error['code']}`" not in DOCS.read_text(encoding="utf-8"):
        return "undocumented code"
    if error["code"] in BODY_FAULTS or not isinstance(asked, dict):
        return ""
    field = (error["param"] or "").split(".")[0].split("[")[0]
    is_there = field in asked or error["code"] == "missing_required_parameter"
    if is_there or not field.isidentifier():
        return ""
    return "names no field of the request"


def run(server: RunningServer, cases: list[Case]) -> list[str]:
    with (
        ThreadPoolExecutor(CLIENTS) as pool,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client,
    ):
        return [fault for fault in pool.map(lambda case: send(client, case), cases) if fault]


def settle(server: RunningServer) -> dict[str, Any]:
    """The server's health when it has nothing to do, after a few questions as of everyone."""
    for _ in range(5):
        assert server.chat("hello", max_tokens=1).status_code == 200
    wait_until(lambda: server.client.get("/health").json()["running"] == 0)
    gc.collect()
    health: dict[str, Any] = server.client.get("/health").json()
    return health


def quickest(server: RunningServer) -> float:
    """Seconds of the quickest of ten plain questions."""

    def seconds() -> float:
        began = time.monotonic()
        server.client.post("/v1/chat/completions", json=body(max_tokens=1))
        return time.monotonic() - began

    return min(seconds() for _ in range(10))


def test_the_fuzzer_makes_what_it_should() -> None:
    first = RequestFuzzer(SEED)
    again = RequestFuzzer(SEED)
    cases = [first.case() for _ in range(300)]
    assert cases == [again.case() for _ in range(300)]
    fields = Counter(field for case in cases if isinstance(case.body, dict) for field in case.body)
    assert {"tools", "audio", "stop_token_ids", "use_beam_search", "response_format"} <= set(fields)
    assert 100 < sum(case.is_plain for case in cases) < 200


def test_every_request_is_answered_or_refused_with_a_documented_reason(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest keeps the records of a test, which for thousands of requests are megabytes.
    caplog.set_level(logging.CRITICAL)
    fuzzer = RequestFuzzer(SEED)
    assert run(server, [fuzzer.case() for _ in range(REQUESTS // 2)]) == []
    settle(server)
    before = quickest(server)
    tracemalloc.start()
    start = tracemalloc.get_traced_memory()[0]
    assert run(server, [fuzzer.case() for _ in range(REQUESTS - REQUESTS // 2)]) == []
    health = settle(server)
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert (health["status"], health["open_requests"], health["open_bodies"]) == ("ok", 0, 0)
    assert (health["running"], health["waiting"], health["step_seconds"]) == (0, 0, 0)
    assert grown < 3_000_000, "bytes of Python's memory"
    assert quickest(server) < 5 * before + 0.2
