"""Conversion of third-party preferences to a conversation and the text of a rejected answer.

`chosen` and `rejected` are answers or whole conversations, as text, one turn or a list of turns, as
in TRL and LLaMA-Factory; `rejected_response` and `rejected_messages` stand beside an ordinary
conversation, as in ms-swift.
"""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

from megatron_vita.data.samples.foreign_turns import PAIRS as TURN_PAIRS
from megatron_vita.data.samples.foreign_turns import ROLE_FIELDS, decode_turns, read_chat
from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.data.samples.media_fields import has_media_fields, is_filled
from megatron_vita.errors import DataError

FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages")
ANSWERERS = {
    "prompt": "completion",
    "question": "answer",
    "query": "response",
    "instruction": "output",
    "user": "assistant",
    "message_1": "message_2",
    "input": "output",
}
"""Fields of questions, and those of their answers; the last is the rest of others' questions."""


class Preference(NamedTuple):
    """Fields of a record with the chosen answer alone, and the text of the rejected one; None
    where none was rejected."""

    fields: dict[str, Any]
    rejected: str | None


def take_preference(fields: dict[str, Any], *, chats: tuple[str, ...]) -> Preference:
    """Take the rejected answer out of a record.

    Args:
        fields: the record's fields.
        chats: fields that may hold its turns.

    Raises:
        DataError: naming the field: an answer is missing, is no text or has media of its own, the
            question is missing, or the conversations of the two answers differ before them.
    """
    _refuse_own_media(fields)
    # Tables without lists write an empty list as text.
    given = [name for name in FIELDS if is_filled(fields.get(name)) and fields[name] != "[]"]
    if not given:
        return Preference(fields, None)
    rest = {name: value for name, value in fields.items() if name not in FIELDS}
    chat = next((name for name in chats if is_filled(rest.get(name))), "")
    if given == ["rejected_response"]:
        return Preference(rest, _text(fields[given[0]], given[0]))
    if given == ["rejected_messages"]:
        if not chat:
            raise DataError("rejected_messages is given without messages, which it is compared to")
        turns = _chat_turns(rest[chat], chat)
        rejected = _chat_turns(fields[given[0]], given[0])
        _check_same_question(turns, rejected, names=(chat, given[0]))
        _answer(turns[-1], chat)
        return Preference(rest, _answer(rejected[-1], given[0]))
    if given != ["chosen", "rejected"]:
        raise DataError(
            f"{given[0]} is {fields[given[0]]!r:.80}, beside {given[1:] or 'no other answer'}: "
            "chosen and rejected are needed, or one of rejected_response and rejected_messages"
        )
    return _preferred(
        rest,
        chat,
        chosen=_answer_turns(fields["chosen"], "chosen"),
        rejected=_answer_turns(fields["rejected"], "rejected"),
    )


def _refuse_own_media(fields: Mapping[str, Any]) -> None:
    """Raise DataError, naming the field, if one of two answers has media of its own."""
    for name, value in fields.items():
        kind, _, rest = str(name).lower().partition("_")
        is_own = kind in ("chosen", "rejected") and has_media_fields([rest])
        if is_own and is_filled(value) and value != "[]":
            raise DataError(
                f"{name} is {value!r:.80}: both answers of a pair show the same media, those of "
                "their question (import has --ignore)"
            )


def _preferred(
    rest: dict[str, Any], chat: str, *, chosen: list[Any], rejected: list[Any]
) -> Preference:
    """Put a chosen answer behind its question, which `rest` or the answers themselves hold."""
    _check_same_question(chosen, rejected, names=("chosen", "rejected"))
    answer = _answer(chosen[-1], "chosen")
    text = _answer(rejected[-1], "rejected")
    asker = next((name for name in ANSWERERS if is_filled(rest.get(name))), "")
    if len(chosen) > 1:
        rest = _without_question(_without_chat(rest, chat, chosen), asker, chosen)
        return Preference(rest | {"messages": chosen}, text)
    if chat:
        turns = _asking_turns(_chat_turns(rest[chat], chat), chat)
        return Preference(rest | {chat: [*turns, *chosen]}, text)
    if not asker:
        raise DataError(
            f"chosen is {answer!r:.80}, an answer alone: its question is needed, before it in "
            f"chosen and rejected, or beside it as messages or as one of {', '.join(ANSWERERS)}"
        )
    question = _decoded(rest[asker])
    if not isinstance(question, str):
        turns = _asking_turns(_as_list(question, asker), asker)
        return Preference(_without(rest, asker) | {"messages": [*turns, *chosen]}, text)
    answerer = ANSWERERS[asker]
    if is_filled(rest.get(answerer)):
        raise DataError(f"{answerer} and chosen are both given: one chosen answer is needed")
    return Preference(rest | {answerer: answer}, text)


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in fields.items() if other != name}


def _without_chat(rest: dict[str, Any], chat: str, turns: list[Any]) -> dict[str, Any]:
    """Leave out a conversation that the turns of an answer repeat, with the answer or without."""
    if not chat:
        return rest
    given = read_chat(rest[chat])
    if given not in (read_chat(turns), read_chat(turns[:-1])):
        raise DataError(
            f"{chat} and chosen hold different turns: those of chosen are needed in {chat}, with "
            "its last one or without, or one of the two (import has --ignore)"
        )
    return _without(rest, chat)


def _without_question(rest: dict[str, Any], asker: str, turns: list[Any]) -> dict[str, Any]:
    """Leave out a question that the turns of an answer repeat."""
    if not asker:
        return rest
    question = _decoded(rest[asker])
    if isinstance(question, str):
        is_repeated = question in [message["content"] for message in read_chat(turns).messages]
    else:
        asked = _as_list(question, asker)
        is_repeated = read_chat(asked) == read_chat(turns[: len(asked)])
    if not is_repeated:
        raise DataError(
            f"{asker} is {question!r:.80}, which is no turn of chosen: one question is needed "
            "(import has --ignore)"
        )
    return _without(rest, asker)


def _asking_turns(turns: list[Any], name: str) -> list[Any]:
    """Return turns that an answer follows; raises DataError if they end with one."""
    if read_chat(turns).messages[-1]["role"] == "assistant":
        raise DataError(
            f"{name} ends with an answer, and chosen holds another: the turns of {name} must end "
            "with the question"
        )
    return turns


def _check_same_question(chosen: list[Any], rejected: list[Any], *, names: tuple[str, str]) -> None:
    asked = [read_chat(turns[:-1]) for turns in (chosen, rejected)]
    if asked[0] == asked[1]:
        return
    messages = zip_longest(asked[0].messages, asked[1].messages)
    differing = ((i, one, other) for i, (one, other) in enumerate(messages) if one != other)
    # Else it is their media.
    i, one, other = next(differing, (0, asked[0].media, asked[1].media))
    raise DataError(
        f"{names[0]} and {names[1]} differ before their last turns, at turn {i}: {one!r:.80} and "
        f"{other!r:.80}: answers to the same turns are needed"
    )


def _decoded(value: Any) -> Any:
    """Parse turns that are written as JSON text; any other value is returned as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        turns = parse_json(value)
    except DataError:
        return value  # "[Answer] A cat."
    if isinstance(turns, list) and turns and all(map(_is_turn, turns)):
        return turns
    return value  # an answer that is JSON itself, such as boxes


def _is_turn(value: Any) -> bool:
    names = (*ROLE_FIELDS, "user", "human")
    return isinstance(value, Mapping) and any(name in value for name in names)


def _answer_turns(value: Any, name: str) -> list[Any]:
    """Return the turns of an answer; its text alone, or a single turn, is one."""
    value = _decoded(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return _as_list(value, name)


def _chat_turns(value: Any, name: str) -> list[Any]:
    """Return the turns of a conversation, which may be written as JSON text."""
    return _as_list(decode_turns(value), name)


def _as_list(value: Any, name: str) -> list[Any]:
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and value:
        return [single for turn in value for single in _single_turns(turn)]
    raise DataError(f"{name} is {value!r:.80}: text or turns are needed")


def _single_turns(turn: Any) -> list[Any]:
    """Part a turn of question and answer, such as {user, assistant}; return any other as it is."""
    is_both = isinstance(turn, Mapping) and any({*pair} <= turn.keys() for pair in TURN_PAIRS)
    if not is_both:
        return [turn]
    messages, media = read_chat([turn])
    if any(media.values()):
        raise DataError(f"{turn!r:.80} has media: a turn of its own is needed for its question")
    return messages


def _answer(turn: Any, name: str) -> str:
    """Return the text of an assistant's turn."""
    messages, media = read_chat([turn])
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{name} ends with {turn!r:.80}: an answer of the assistant is needed")
    if any(media.values()):
        raise DataError(
            f"{name} ends with {turn!r:.80}, which has media of its own: both answers of a pair "
            "show the same media, those of their question"
        )
    return _text(messages[0]["content"], name)


def _text(content: Any, name: str) -> str:
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{name} is {content!r:.80}: the text of one answer is needed")
    return content
