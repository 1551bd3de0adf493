"""Preferences in the forms of other projects: read as a conversation and a rejected answer, or
refused by the name of the field."""

import json
from typing import Any

import pytest

from megatron_vita.data.samples.foreign import PAIRS, sample_of
from megatron_vita.data.samples.foreign_pairs import ANSWERERS
from megatron_vita.data.samples.records import check_record
from megatron_vita.errors import DataError

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Who?"}
GOOD = {"role": "assistant", "content": "I."}
BAD = {"role": "assistant", "content": "Go away."}
PAIR = {"messages": [USER, GOOD], "rejected_response": "Go away."}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Who?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 8.0},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Who?", "chosen": "I.", "rejected": "Go away."},
        {"question": "Who?", "chosen": "I.", "rejected": "Go away.", "origin_dataset": "x"},
        {"instruction": "Who?", "input": "", "chosen": "I.", "rejected": "Go away."},
        {"query": "Who?", "response": "I.", "rejected_response": "Go away."},
        {"user": "Who?", "chosen": "I.", "rejected": "Go away."},
        {"message_1": "Who?", "chosen": "I.", "rejected": "Go away."},
        {"input": "Who?", "chosen": "I.", "rejected": "Go away."},
        {"prompt": json.dumps([USER]), "chosen": "I.", "rejected": "Go away."},
        {"prompt": json.dumps([USER]), "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Who?", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": json.dumps([USER, GOOD]), "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"messages": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"conversations": [human("Who?"), gpt("I.")], "rejected_messages": [USER, BAD]},
        {"prompt": [human("Who?")], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": {"user": "Who?", "assistant": "I."}, "rejected": [USER, BAD]},
        {"chosen": json.dumps([{"human": "Who?", "gpt": "I."}]), "rejected": [USER, BAD]},
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": gpt("I."),
            "rejected": gpt("Go away."),
        },
        {
            "prompt": [USER],
            "chosen": [GOOD | {"content": [{"type": "text", "text": "I."}]}],
            "rejected": [BAD | {"content": [{"type": "text", "text": "Go "}, {"type": "text", "text": "away."}]}],
        },
    ],
)  # fmt: skip
def test_preferences_of_others_become_a_conversation_and_a_rejected_answer(
    record: dict[str, Any],
) -> None:
    sample = sample_of(record, prompt=None)
    check_record(sample)
    assert sample["rejected_response"] == "Go away."
    assert [turn["role"] for turn in sample["messages"]] == ["user", "assistant"]
    assert sample["messages"][1]["content"] in ("I.", [{"type": "text", "text": "I."}])


@pytest.mark.parametrize(
    "answer",
    ["[12, 40, 200, 310]", '[{"bbox_2d": [1, 2, 3, 4]}]', "[Answer] A cat.", " [] ", '["I."]'],
)
def test_answers_that_begin_like_a_list_are_texts(answer: str) -> None:
    for chosen, rejected in ((answer, "Go away."), ("I.", answer)):
        for question in ({"prompt": "Who?"}, {"prompt": [USER]}, {"messages": [USER]}):
            sample = sample_of(question | {"chosen": chosen, "rejected": rejected})
            check_record(sample)
            assert sample["messages"] == [USER, {"role": "assistant", "content": chosen}]
            assert sample["rejected_response"] == rejected


def test_a_system_prompt_beside_a_pair_comes_before_its_question() -> None:
    record = {"system": "Be kind.", "input": "Who?", "chosen": "I.", "rejected": "Go away."}
    sample = sample_of(record)
    check_record(sample)
    assert sample["messages"] == [{"role": "system", "content": "Be kind."}, USER, GOOD]


def test_questions_of_pairs_are_those_of_other_records() -> None:
    assert set(ANSWERERS) == {asker for asker, _ in PAIRS}
    assert set(ANSWERERS.items()) <= set(PAIRS)


def test_media_of_preferences_stay_with_the_question() -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Who?"}]
    asked = {"role": "user", "content": content}
    sample = sample_of({"prompt": [asked], "chosen": [GOOD], "rejected": [BAD]})
    assert sample["images"] == ["a.png"]
    beside = sample_of(
        {"image": "a.png", "question": "Who?", "chosen": "I.", "rejected": "Go away."}
    )
    assert (beside["images"], beside["messages"][0]["content"]) == (["a.png"], "<image>\nWho?")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, GOOD], "rejected": "No."}, "rejected is 'No.', beside no other answer"),
        ({"messages": [USER], "chosen": "Yes."}, "chosen is 'Yes.', beside no other answer"),
        (PAIR | {"rejected": "No."}, r"rejected is 'No.', beside \['rejected_response'\]"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, r"differ before their last turns, at turn 0: .*Who\?.*I\."),
        ({"chosen": [USER, GOOD], "rejected": "No."}, "chosen and rejected differ before"),
        ({"messages": [USER, GOOD], "rejected_messages": [BAD]}, "differ before their last turns"),
        ({"rejected_messages": [USER, BAD]}, "rejected_messages is given without messages"),
        ({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt is 'Why.', which is no turn"),
        ({"chosen": [USER, GOOD], "rejected": [USER, USER]}, "an answer of the assistant is needed"),
        ({"chosen": "Human: a\nAssistant: b", "rejected": "Human: a\nAssistant: c"}, "'Human: a.* an answer alone"),
        ({"system": "Hi.", "Input": "a", "chosen": "b", "rejected": "c"}, "chosen is 'b', an answer alone"),
        ({"chosen": [GOOD], "rejected": [BAD], "system": "Hi."}, "chosen is 'I.', an answer alone"),
        ({"messages": [SYSTEM], "chosen": [GOOD], "rejected": [BAD]}, r"roles are \['system', 'assistant'\]"),
        ({"messages": [USER, BAD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "messages and chosen hold different"),
        ({"messages": [USER, GOOD], "chosen": "I.", "rejected": "No."}, "messages ends with an answer, and chosen"),
        ({"prompt": [USER, GOOD], "chosen": "I.", "rejected": "No."}, "prompt ends with an answer, and chosen"),
        ({"prompt": "Why?", "messages": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "prompt is 'Why.'"),
        (PAIR | {"images": ["a.png"], "rejected_images": ["b/a.png"]}, r"rejected_images is .* show the same media"),
        (PAIR | {"image": "a.png", "rejected_image": {"bytes": b"x"}}, "rejected_image is .* show the same media"),
        ({"messages": [USER, GOOD], "rejected_videos": ["a.mp4"]}, "rejected_videos is .* show the same media"),
        ({"prompt": "Who?", "chosen": "I.", "rejected": [BAD | {"images": ["a.png"]}]}, "rejected ends with .* media"),
        ({"prompt": "Who?", "chosen": [GOOD | {"image": "a.png"}], "rejected": "No."}, "chosen ends with .* media"),
        ({"instruction": "a", "output": "b", "chosen": "c", "rejected": "d"}, "output and chosen are both given"),
        (PAIR | {"rejected_response": ["No."]}, r"rejected_response is \['No.'\]"),
        (PAIR | {"rejected_response": 3}, "rejected_response is 3"),
        (PAIR | {"rejected_response": "I."}, "rejected_response is the chosen answer itself"),
        (PAIR | {"messages": [SYSTEM, GOOD]}, r"roles are \['system', 'assistant'\]"),
        (PAIR | {"messages": [USER, GOOD | {"content": " "}]}, "the text of a chosen answer is needed"),
        (PAIR | {"messages": [USER, GOOD | {"content": []}]}, "the text of a chosen answer is needed"),
        (PAIR | {"rejected_response": "Go \ud83d"}, "rejected_response has the lone surrogate"),
        (PAIR | {"messages": [USER, GOOD, USER]}, r"their roles are \['user', 'assistant', 'user'\]"),
        (PAIR | {"messages": [USER, GOOD, USER, GOOD | {"loss": False}]}, "messages must end with an answer"),
        ({"text": "A book.", "rejected_response": "No."}, "rejected_response is given beside a text"),
        (PAIR | {"kto_tag": True}, "kto_tag is True: of preferences .* only pairs"),
    ],
)  # fmt: skip
def test_preferences_that_are_no_pairs_are_refused_by_name(
    record: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        check_record(sample_of(record, prompt=None))


@pytest.mark.parametrize("empty", [None, "", [], "[]"])
def test_empty_fields_of_preferences_count_as_absent(empty: Any) -> None:
    names = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images")
    record = {"messages": [USER, GOOD]} | dict.fromkeys(names, empty)
    assert sample_of(record) == {"messages": [USER, GOOD]}
