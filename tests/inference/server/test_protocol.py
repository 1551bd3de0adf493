"""OpenAI's chat completions: what its own client sends is answered as it expects; all else is
refused by name."""

import json
from typing import Any

import openai
import pytest

from megatron_vita.inference.requests.types import SamplingParams
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import MODEL, RunningServer, body, refusal, running


@pytest.fixture(scope="module")
def client(echo: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{echo.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, text: str = "hello", **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": text}], **fields
    )


def test_openais_client_gets_an_answer_with_usage(client: openai.OpenAI) -> None:
    answer = ask(client, "héllo")
    assert answer.choices[0].message.content == "héllo"
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == (
        "stop",
        "chat.completion",
        MODEL,
    )
    assert (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
        answer.usage.total_tokens,
    ) == (6, 6, 12)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.choices[0].logprobs is None


def test_openais_client_gets_the_same_answer_as_a_stream(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "héllo", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "héllo"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "stop"
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_usage_where_it_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 10
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_with_done(echo: RunningServer) -> None:
    response = echo.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_come_with_the_bytes_of_tokens(
    client: openai.OpenAI, stream: bool
) -> None:
    answer = ask(client, "é", logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    content = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert bytes(byte for token in content for byte in token.bytes) == "é".encode()
    assert [token.logprob for token in content] == [-0.5, -0.5]
    assert content[0].token == "\ufffd"  # half a character
    assert [(other.bytes, other.logprob) for other in content[0].top_logprobs] == [
        ([195], -0.5),
        ([196], -1.5),
    ]


def test_log_probabilities_without_likeliest_tokens(client: openai.OpenAI) -> None:
    answer = ask(client, "ab", logprobs=True)
    assert [token.top_logprobs for token in answer.choices[0].logprobs.content] == [[], []]


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_are_kept_apart(stream: bool) -> None:
    with running(FakeEngine(reply="answer {choice}")) as server:
        answer = ask(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none"), n=3, stream=stream)
        texts = ["", "", ""]
        for chunk in answer if stream else [answer]:
            for choice in chunk.choices:
                texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    assert texts == ["answer 0", "answer 1", "answer 2"]


def test_stop_strings_and_lengths_end_answers(client: openai.OpenAI) -> None:
    assert ask(client, "one two three", stop=" two").choices[0].message.content == "one"
    cut = ask(client, "one two three", max_tokens=5).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("one t", "length")


def test_all_options_reach_the_engine(echo: RunningServer, client: openai.OpenAI) -> None:
    ask(
        client, max_completion_tokens=7, temperature=0.5, top_p=0.9, n=2, stop=["x", "y"], seed=5,
        presence_penalty=0.1, frequency_penalty=0.2, logprobs=True, top_logprobs=3,
        extra_body={"top_k": 4, "repetition_penalty": 1.1, "ignore_eos": True},
    )  # fmt: skip
    assert echo.engine.samplings[-1] == SamplingParams(
        max_new_tokens=7, temperature=0.5, top_k=4, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.2, stop=("x", "y"), seed=5, n=2, logprobs=3, ignore_eos=True,
    )  # fmt: skip


def test_defaults_are_openais(echo: RunningServer, client: openai.OpenAI) -> None:
    ask(client)
    ask(client, temperature=None, seed=None)
    first, second = echo.engine.samplings[-2:]
    assert (first.temperature, first.top_p, first.n, first.logprobs) == (1.0, 1.0, 1, None)
    assert first.seed != second.seed


def test_beam_search_is_greedy_by_default(echo: RunningServer, client: openai.OpenAI) -> None:
    ask(client, extra_body={"num_beams": 3, "length_penalty": 0.5})
    found = echo.engine.samplings[-1]
    assert (found.num_beams, found.temperature, found.length_penalty) == (3, 0.0, 0.5)


def test_negative_seeds_are_seeds(echo: RunningServer, client: openai.OpenAI) -> None:
    ask(client, seed=-1)
    assert echo.engine.samplings[-1].seed == 2**63 - 1


def test_tags_that_users_type_stay_text(echo: RunningServer, client: openai.OpenAI) -> None:
    assert ask(client, "what is <image>?").choices[0].message.content == "what is <image>?"


def test_roles_and_parts_become_a_prompt(echo: RunningServer, client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
    )
    messages = echo.engine.prompts[-1].messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == parts


def test_an_answer_can_be_sent_back_as_a_message(client: openai.OpenAI) -> None:
    answer = ask(client).choices[0].message
    again = client.chat.completions.create(
        model=MODEL, messages=[answer, {"role": "user", "content": "more"}]
    )
    assert again.choices[0].message.content == "more"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_another_model_is_refused(echo: RunningServer) -> None:
    assert echo.error(status=404, model="gpt-5")["code"] == "model_not_found"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "colour"),
    ({"logit_bias": {"50256": -100}}, "logit_bias"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 1.5}, "n"),
    ({"num_beams": 9}, "num_beams"),
    ({"num_beams": 2, "temperature": 0.5}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens"),
    ({"max_frames": 0}, "max_frames"),
    ({"max_frames": 5000}, "max_frames"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"length_penalty": 11}, "length_penalty"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"x": 1}}, "stream_options.x"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"model": None}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_refused_by_name(
    echo: RunningServer, fields: dict[str, Any], param: str
) -> None:
    error = echo.error(status=400, **fields)
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(echo: RunningServer, value: str) -> None:
    for field in ("temperature", "top_p", "repetition_penalty", "frequency_penalty"):
        text = json.dumps(body())[:-1] + f', "{field}": {value}}}'
        response = post(echo, text.encode())
        assert refusal(response, 400)["type"] == "invalid_request_error"


def post(server: RunningServer, data: bytes, content_type: str = "application/json") -> Any:
    return server.client.post(
        "/v1/chat/completions", content=data, headers={"content-type": content_type}
    )


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000,
        json.dumps(body()).encode()[:-1] + b', "user": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        json.dumps(body()).encode().replace(b"hello", b"\\ud800"),
    ],
    ids=lambda data: repr(data[:20]),
)  # fmt: skip
def test_what_is_no_request_is_refused(echo: RunningServer, data: bytes) -> None:
    refusal(post(echo, data), 400)


def test_other_content_types_are_refused(echo: RunningServer) -> None:
    refusal(post(echo, json.dumps(body()).encode(), "text/plain"), 415)


def test_unknown_paths_and_methods_are_refused_in_the_same_form(echo: RunningServer) -> None:
    refusal(echo.client.get("/v1/nothing"), 404)
    refusal(echo.client.get("/v1/chat/completions"), 405)
    refusal(echo.client.post("/health"), 405)
