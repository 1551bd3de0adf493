"""Conversations: roles, places of media, and errors that name field and value."""

from typing import Any

import pytest

from megatron_vita.errors import DataError
from megatron_vita.text.conversation import MediaPart, TextPart, Turn, check_messages

IMAGE = MediaPart("image")
VIDEO = MediaPart("video")


def turns_of(*messages: tuple[str, Any], images: int = 0, videos: int = 0) -> list[Turn]:
    sample = {
        "messages": [{"role": role, "content": content} for role, content in messages],
        "images": [f"{index}.png" for index in range(images)],
        "videos": [f"{index}.mp4" for index in range(videos)],
    }
    return check_messages(sample)


def user_parts(content: Any, **media: int) -> list[TextPart | MediaPart]:
    return turns_of(("user", content), ("assistant", "yes"), **media)[0].parts


def test_roles_go_by_one_name() -> None:
    turns = turns_of(
        ("system", "be kind"),
        ("human", "hi"),
        ("gpt", "hello"),
        ("user", "hi"),
        ("assistant", "bye"),
    )
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant"]


def test_tags_of_users_are_places_in_order() -> None:
    parts = user_parts("<image>\nA<video> and <image>", images=2, videos=1)
    assert parts == [IMAGE, TextPart("\nA"), VIDEO, TextPart(" and "), IMAGE]


def test_tags_of_the_system_are_places() -> None:
    turns = turns_of(("system", "see <image>"), ("user", "?"), ("assistant", "!"), images=1)
    assert turns[0].parts == [TextPart("see "), IMAGE]


def test_an_escaped_tag_is_literal_text() -> None:
    assert user_parts(r"write \<image> or <image>, \<video>", images=1) == [
        TextPart("write <image> or "),
        IMAGE,
        TextPart(", <video>"),
    ]


def test_a_backslash_before_anything_else_stays() -> None:
    assert user_parts(r"a\b \<img> \\<image>") == [TextPart(r"a\b \<img> \<image>")]


def test_what_an_assistant_says_is_literal() -> None:
    turns = turns_of(("user", "which tag?"), ("assistant", r"<image> or \<video>"))
    assert turns[1].parts == [TextPart(r"<image> or \<video>")]


def test_parts_are_taken_as_they_are_and_their_text_is_literal() -> None:
    content = [{"type": "text", "text": r"\<image> <video>"}, {"type": "image"}, {"type": "video"}]
    assert user_parts(content, images=1, videos=1) == [TextPart(r"\<image> <video>"), IMAGE, VIDEO]


def test_neighbouring_texts_are_one_and_empty_ones_are_dropped() -> None:
    content = [{"type": "text", "text": text} for text in ("a", "", "b")]
    assert user_parts([*content, {"type": "image"}, {"type": "text", "text": ""}], images=1) == [
        TextPart("ab"),
        IMAGE,
    ]
    assert user_parts("") == []


def test_conversations_is_another_name_of_messages() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert check_messages({"conversations": messages}) == check_messages(
        {"messages": messages, "images": None}
    )


def test_null_beside_a_filled_alternative_is_absent() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    turns = check_messages({"messages": messages})
    for sample in (
        {"messages": None, "conversations": messages},
        {"messages": messages, "conversations": None, "images": None, "videos": None},
        {"messages": messages, "conversations": messages},
        {"messages": [turn | {"loss": None, "tool_calls": None} for turn in messages]},
    ):
        assert check_messages(sample) == turns


@pytest.mark.parametrize(
    ("marks", "is_trained"),
    [
        ({"loss": False}, False),
        ({"loss": 0}, False),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"loss": True}, True),
        ({"weight": 1}, True),
        ({"train": True, "weight": None}, True),
        ({}, True),
    ],
)
def test_a_turn_says_whether_it_is_trained(marks: dict[str, Any], is_trained: bool) -> None:
    answers = [{"role": "assistant", "content": "b"} | marks, {"role": "gpt", "content": "c"}]
    user = {"role": "user", "content": "a", "weight": 1, "loss": False}
    turns = check_messages({"messages": [user, answers[0], user, answers[1]]})
    assert [turn.loss for turn in turns if turn.role == "assistant"] == [is_trained, True]


def test_a_prompt_needs_no_answer_where_it_is_said_so() -> None:
    prompt = {"messages": [{"role": "user", "content": "hello"}]}
    assert check_messages(prompt, needs_answer=False) == [Turn("user", [TextPart("hello")])]
    with pytest.raises(DataError, match=r"no assistant turn.*\['user'\]"):
        check_messages(prompt)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([], "the sample is list"),
        ({"text": "a"}, r"no field messages among \['text'\]"),
        ({"messages": None}, "no field messages"),
        (
            {"messages": None, "conversations": None},
            "among \\[\\], messages is null, conversations is null: a list",
        ),
        (
            {"messages": [{"role": "gpt", "content": "a"}], "conversations": []},
            "messages and conversations are both given, and differ",
        ),
        ({"messages": "hello"}, "messages is str: a list"),
        *(
            ({"messages": [{"role": "gpt", "content": "a"} | wrong]}, told)
            for wrong, told in (
                ({"loss": 0}, "no assistant turn is trained"),
                ({"weight": 0.5}, r"messages\[0\].weight is 0.5: true, 1, false or 0"),
                ({"loss": "no"}, r"messages\[0\].loss is 'no': true, 1, false or 0"),
                ({"loss": True, "weight": 0}, "both that it is trained and that it is not"),
                ({"train_detail": [{"train": False}]}, r"messages\[0\].train_detail is .* masked"),
                ({"mask": 1}, r"messages\[0\].mask is 1: loss, train or weight says"),
                ({"content": None, "tool_calls": [{"id": 1}]}, "tool_calls is .* not trained"),
                ({"reasoning_content": "so"}, "reasoning_content is 'so': thoughts"),
                ({"role": "user", "loss": True}, "loss is True: only assistants' turns"),
                ({"role": "tool", "tool_call_id": "x"}, "tool_call_id is 'x': results of tools"),
            )
        ),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": ["hello"]}, r"messages\[0\] has 'hello': the fields role and content"),
        ({"messages": [{"from": "human", "value": "a"}]}, r"messages\[0\] has \['from', 'value'\]"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            r"messages\[0\].role is 'bot'; known roles: user",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"messages\[0\].role is \['user'\]"),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\].content is NoneType: a string",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            r"messages\[0\].content\[0\] is 'a': its type must be",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            r"content\[0\] is .*audio.* its type must",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": ["a"]}]}]},
            r"content\[0\] is .* its type must",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"content\[0\].text is None: a string",
        ),
        (
            {"messages": [{"role": "user", "content": "ab\ud800"}]},
            r"messages\[0\].content.*'\\ud800' at character 2",
        ),
        (
            {"messages": [{"role": "gpt", "content": ""}, {"role": "user", "content": ""}]},
            "every turn .* is empty",
        ),
        (
            {"messages": [{"role": "gpt", "content": "a"}], "images": "a.png"},
            "images is str: a list",
        ),
        (
            {"messages": [{"role": "gpt", "content": "<image>"}], "images": ["a"]},
            "0 places for images .* lists 1",
        ),
        (
            {
                "messages": [
                    {"role": "gpt", "content": "a"},
                    {"role": "user", "content": "<video>" * 3},
                ]
            },
            "3 .* lists 0",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_field_and_value(
    sample: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        check_messages(sample)
