"""Conversion of third-party preferences to a conversation and the text of a rejected answer.

`chosen` and `rejected` are answers or whole conversations, as text, one turn or a list of turns, as
in TRL and LLaMA-Factory; `rejected_response` and `rejected_messages` stand beside an ordinary
conversation, as in ms-swift.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_vita.data.samples.foreign_turns import decode_turns, read_chat
from megatron_vita.data.samples.media_fields import is_filled
from megatron_vita.errors import DataError

FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages")
ANSWERERS = {
    "prompt": "completion",
    "question": "answer",
    "query": "response",
    "instruction": "output",
}
"""Fields of questions, and those of their answers."""


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
        DataError: naming the field: an answer is missing or no text, or the conversations of the
            two answers differ before them.
    """
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
        turns = _turns(rest[chat])
        _check_same_question(turns, _turns(fields[given[0]]), names=(chat, given[0]))
        return Preference(rest, _answer(_turns(fields[given[0]])[-1], given[0]))
    if given != ["chosen", "rejected"]:
        raise DataError(
            f"{given[0]} is {fields[given[0]]!r:.80}, beside {given[1:] or 'no other answer'}: "
            "chosen and rejected are needed, or one of rejected_response and rejected_messages"
        )
    return _preferred(
        rest, chat, chosen=_turns(fields["chosen"]), rejected=_turns(fields["rejected"])
    )


def _preferred(
    rest: dict[str, Any], chat: str, *, chosen: list[Any], rejected: list[Any]
) -> Preference:
    """Put a chosen answer behind its question, which `rest` or the answers themselves hold."""
    _check_same_question(chosen, rejected, names=("chosen", "rejected"))
    text = _answer(rejected[-1], "rejected")
    asker = next((name for name in ANSWERERS if is_filled(rest.get(name))), "")
    if chat:
        return Preference(rest | {chat: [*_turns(rest[chat]), *chosen]}, text)
    if not asker:
        return Preference(rest | {"messages": chosen}, text)
    question = rest[asker]
    if len(chosen) > 1:
        return Preference(_without_question(rest, asker, chosen) | {"messages": chosen}, text)
    if not isinstance(question, str):
        without = {name: value for name, value in rest.items() if name != asker}
        return Preference(without | {"messages": [*_turns(question), *chosen]}, text)
    answerer = ANSWERERS[asker]
    if is_filled(rest.get(answerer)):
        raise DataError(f"{answerer} and chosen are both given: one chosen answer is needed")
    return Preference(rest | {answerer: _answer(chosen[0], "chosen")}, text)


def _without_question(rest: dict[str, Any], asker: str, turns: list[Any]) -> dict[str, Any]:
    """Leave out a question that the turns of an answer repeat."""
    question = rest[asker]
    said = [message["content"] for message in read_chat(turns).messages]
    if question not in said and _turns(question) != turns[: len(_turns(question))]:
        raise DataError(
            f"{asker} is {question!r:.80}, which is no turn of chosen: one question is needed"
        )
    return {name: value for name, value in rest.items() if name != asker}


def _check_same_question(chosen: list[Any], rejected: list[Any], *, names: tuple[str, str]) -> None:
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{names[0]} and {names[1]} differ before their last turns: answers to the same turns "
            "are needed"
        )


def _turns(value: Any) -> list[Any]:
    """Return a list of turns; a single turn, or the text of an answer, is one."""
    value = decode_turns(value)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list) and value:
        return value
    raise DataError(f"{value!r:.80}: turns or text are needed")


def _answer(turn: Any, name: str) -> str:
    """Return the text of an assistant's turn."""
    messages = read_chat([turn]).messages
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{name} ends with {turn!r:.80}: an answer of the assistant is needed")
    return _text(messages[0]["content"], name)


def _text(content: Any, name: str) -> str:
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{name} is {content!r:.80}: the text of one answer is needed")
    return content
