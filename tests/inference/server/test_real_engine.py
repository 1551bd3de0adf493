"""The server with the engine of a tiny random model: answers are the engine's own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import openai
import pytest

from megatron_vita import platform
from megatron_vita.inference.client.client import ChatServer, openai_messages
from megatron_vita.inference.requests.types import SamplingParams
from tests.inference.server.running_server import MODEL, RunningServer, running
from tests.inference.tiny import prompts, tiny_engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    platform.initialize_process()
    with running(tiny_engine(tmp_path_factory.mktemp("engine"))) as server:
        yield server


def test_answers_and_scores_are_those_of_the_engine(server: RunningServer, tmp_path: Path) -> None:
    sampling = SamplingParams(max_new_tokens=8, logprobs=2)
    alone = tiny_engine(tmp_path).generate(prompts(), sampling=sampling)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    for prompt, expected in zip(prompts(), alone, strict=True):
        answer = client.chat.completions.create(
            model=MODEL,
            messages=cast(Any, openai_messages(prompt)),
            max_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
        choice = answer.choices[0]
        assert choice.message.content == expected.text
        assert choice.finish_reason == expected.finish
        got = [token.logprob for token in choice.logprobs.content]
        assert got == pytest.approx([score.chosen.logprob for score in expected.scores], abs=1e-5)
        assert answer.usage.prompt_tokens > 0


def test_the_projects_own_client_works(server: RunningServer) -> None:
    client = ChatServer(f"{server.url}/v1")
    sampling = SamplingParams(max_new_tokens=8, logprobs=1)
    for prompt in prompts():
        whole = client.complete(prompt, sampling=sampling)
        pieces = list(client.stream(prompt, sampling=sampling))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert sum(len(piece.tokens) for piece in pieces) > 0


def test_what_was_read_before_is_cached(server: RunningServer) -> None:
    text = "is there a red circle or a blue square in this picture of two cats"
    first, second = (server.chat(text, max_tokens=1).json()["usage"] for _ in range(2))
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens"] // 2


def test_what_was_read_with_another_salt_is_not_cached(server: RunningServer) -> None:
    text = "two images of cats or one of a square, that is what was asked for in the end"
    salts = ["x", "x", "y", None, None, "x"]
    usages = [server.chat(text, max_tokens=1, cache_salt=salt).json()["usage"] for salt in salts]
    cached = [
        usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] // 2
        for usage in usages
    ]
    assert cached == [False, True, False, False, True, True]
