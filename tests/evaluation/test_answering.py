"""Engines and servers are asked in the same way."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from megatron_vita.errors import DataError, LogitsError, ServerError
from megatron_vita.evaluation.answering import EngineAnswerer, ServerAnswerer
from megatron_vita.inference.client.client import ChatServer, openai_messages, openai_options
from megatron_vita.inference.requests.prompt import MediaFile, Prompt
from megatron_vita.inference.requests.types import CompletionOutput, SamplingParams
from tests.evaluation.chat_server import APIError, FakeChatServer, serving, texts_of

GREEDY = SamplingParams(max_new_tokens=5)


class Echo:
    """An engine that repeats questions and refuses bad ones."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, prompts: Sequence[Prompt], *, sampling: Any) -> list[CompletionOutput]:
        self.batches.append(len(prompts))
        texts = [prompt.messages[0]["content"][-1]["text"] for prompt in prompts]
        if "bad" in texts:
            raise DataError("bad is bad")
        return [
            CompletionOutput(
                text=text,
                token_ids=[],
                finish="error" if text == "ugly" else "stop",
                error="ugly is ugly",
            )
            for text in texts
        ]


def reply(request: dict[str, Any]) -> str:
    text = texts_of(request)[-1]
    if text == "bad":
        raise APIError(400, "bad is bad")
    return text


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with serving(reply) as running:
        yield running


def questions(*texts: str) -> Iterator[Prompt]:
    return (Prompt.ask(text) for text in texts)


def test_an_engine_gets_several_prompts_at_a_time_and_a_refused_one_harms_no_other() -> None:
    engine = Echo()
    replies = list(
        EngineAnswerer(engine, at_once=3).answers(
            questions("a", "bad", "c", "ugly"), sampling=GREEDY
        )
    )
    assert [reply.text for reply in replies] == ["a", "", "c", ""]
    assert [reply.error for reply in replies] == ["", "bad is bad", "", "ugly is ugly"]
    assert engine.batches == [3, 1, 1, 1, 1]


def test_a_model_whose_logits_are_no_numbers_ends_an_evaluation() -> None:
    class Broken:
        def generate(self, prompts: Sequence[Prompt], *, sampling: Any) -> list[CompletionOutput]:
            return [
                CompletionOutput(
                    text="", token_ids=[], finish="model_error", error="the logits are NaN"
                )
            ]

    with pytest.raises(LogitsError, match="the logits are NaN"):
        list(EngineAnswerer(Broken(), at_once=1).answers(questions("a"), sampling=GREEDY))


def test_a_server_gets_several_requests_at_a_time_and_replies_keep_their_order(
    server: FakeChatServer,
) -> None:
    texts = [str(number) for number in range(20)] + ["bad", "end"]
    answerer = ServerAnswerer(ChatServer(server.url), at_once=4)
    replies = list(answerer.answers(questions(*texts), sampling=GREEDY))
    assert [reply.text for reply in replies] == [*texts[:-2], "", "end"]
    assert "bad is bad" in replies[-2].error
    assert {reply.prompt_tokens for reply in replies} == {7, None}
    assert server.most_at_once <= 4
    assert {request["model"] for request in server.requests} == {"tiny"}
    assert {request["max_tokens"] for request in server.requests} == {5}


def test_prompts_are_made_no_earlier_than_needed(server: FakeChatServer) -> None:
    made: list[int] = []

    def prompts() -> Iterator[Prompt]:
        for number in range(100):
            made.append(number)
            yield Prompt.ask(str(number))

    for answerer in (
        EngineAnswerer(Echo(), at_once=2),
        ServerAnswerer(ChatServer(server.url), at_once=2),
    ):
        made.clear()
        replies = answerer.answers(prompts(), sampling=GREEDY)
        assert next(replies).text == "0"
        assert made == [0, 1]
        replies.close()  # type: ignore[attr-defined]


def test_a_server_that_cannot_be_reached_or_refuses_the_key_ends_the_work(
    server: FakeChatServer,
) -> None:
    gone = ChatServer("http://127.0.0.1:9/v1", model="tiny")
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9"):
        list(ServerAnswerer(gone, at_once=1).answers(questions("a"), sampling=GREEDY))
    server.reply = lambda request: (_ for _ in ()).throw(APIError(401, "wrong key"))
    with pytest.raises(ServerError, match="401: wrong key"):
        list(
            ServerAnswerer(ChatServer(server.url), at_once=1).answers(
                questions("a"), sampling=GREEDY
            )
        )


def test_the_key_is_the_environments(
    server: FakeChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    ChatServer(server.url).complete(Prompt.ask("a"), sampling=GREEDY)
    monkeypatch.setenv("VITA_API_KEY", "open")
    ChatServer(server.url).complete(Prompt.ask("a"), sampling=GREEDY)
    assert server.keys == {"Bearer sesame", "Bearer open"}


def test_media_are_data_urls_in_their_places() -> None:
    png = MediaFile(name="a.png", data=b"\x89PNG..")
    film = MediaFile(name="b.mp4", data=b"....ftyp")
    frames = MediaFile(name="c.frames.zip", data=b"PK\x03\x04..")
    prompt = Prompt(
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "human", "content": "<video>then<image>"},
            {"role": "gpt", "content": "a <image>"},
            {"role": "user", "content": [{"type": "video"}]},
        ],
        images=[png],
        videos=[film, frames],
    )
    system, first, said, last = openai_messages(prompt)
    assert system == {"role": "system", "content": "be brief"}
    assert [part["type"] for part in first["content"]] == ["video_url", "text", "image_url"]
    assert first["content"][0]["video_url"]["url"] == "data:video/mp4;base64,Li4uLmZ0eXA="
    assert first["content"][2]["image_url"]["url"].startswith("data:image/png;base64,")
    assert said == {"role": "assistant", "content": "a <image>"}
    assert last["content"][0]["video_url"]["url"].startswith("data:application/zip;base64,")


def test_a_line_break_between_a_medium_and_its_question_is_left_to_the_server() -> None:
    png = MediaFile(name="a.png", data=b"\x89PNG..")
    for question, sent in (("\nwhat?", "what?"), ("\n\nwhat?", "\nwhat?"), (" what?", " what?")):
        for content in (
            f"<image>{question}",
            [{"type": "image"}, {"type": "text", "text": question}],
        ):
            prompt = Prompt(messages=[{"role": "user", "content": content}], images=[png])
            ((_, text),) = (message["content"] for message in openai_messages(prompt))
            assert text == {"type": "text", "text": sent}
    asked = Prompt.ask("what?", images=[png])
    assert openai_messages(asked)[0]["content"][1] == {"type": "text", "text": "what?"}


def test_options_that_the_protocol_does_not_have_are_sent_only_where_they_are_set() -> None:
    assert "extra_body" not in openai_options(SamplingParams())
    options = openai_options(
        SamplingParams(top_k=5, ignore_eos=True, logprobs=2, stop=("x",), seed=3)
    )
    assert options["extra_body"] == {"top_k": 5, "ignore_eos": True}
    assert options["logprobs"] is True
    assert (options["top_logprobs"], options["stop"], options["seed"]) == (2, ["x"], 3)
