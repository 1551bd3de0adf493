"""Conversations of samples: turns of roles, with the positions of images and videos."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vita.errors import DataError

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
"""Roles that samples may use, with the canonical name of each."""

CHAT_FIELDS = ("messages", "conversations")

MEDIA_KINDS = ("image", "video")

LOSS_MARKS = ("loss", "train", "weight")
"""Fields of an assistant's turn that switch its loss on or off: true, 1, false or 0."""

REFUSED_FIELDS = {
    "tool_calls": "tool calls are not trained",
    "function_call": "tool calls are not trained",
    "tool_call_id": "results of tools are not read",
    "reasoning_content": "thoughts beside the answer are not trained",
    "reasoning": "thoughts beside the answer are not trained",
    "thinking": "thoughts beside the answer are not trained",
    "train_detail": "parts of a turn cannot be masked",
    "loss_scale": "a turn is trained or not",
    "loss_weight": "a turn is trained or not",
    "loss_mask": "loss, train or weight says whether a turn is trained",
    "mask": "loss, train or weight says whether a turn is trained",
    "chosen": "of several answers none is chosen here",
    "rejected": "of several answers none is chosen here",
    "candidates": "of several answers none is chosen here",
}
"""Fields of a turn whose content would be lost, and why they are refused where they are filled."""

_TAG = re.compile(r"(\\?)<(image|video)>")


@dataclass(frozen=True)
class TextPart:
    """Literal text."""

    text: str


@dataclass(frozen=True)
class MediaPart:
    """Position of the next image or video of the sample; `kind` is "image" or "video"."""

    kind: str


@dataclass(frozen=True)
class Turn:
    """Message of one role; adjacent texts are one part, and no text is empty.

    `loss` is false for an assistant's turn that is not trained. `listed` is true if the content was
    a list of parts, for which the prompt format defines the text between parts.
    """

    role: str
    parts: list[TextPart | MediaPart]
    loss: bool = True
    listed: bool = field(default=False, compare=False)


def check_messages(sample: Mapping[str, Any], *, needs_answer: bool = True) -> list[Turn]:
    r"""Parse `{"messages": [{"role", "content"}, ...], "images": [...], "videos": [...]}`.

    `conversations` replaces `messages` if that is absent or null. Content is text or a list of
    parts: `{"type": "text", "text"}` (always literal), `{"type": "image"}`, `{"type": "video"}`. In
    text of users and of the system, `<image>` and `<video>` are positions of media and `\<image>`
    is the literal tag; text of an assistant is always literal. An assistant's turn with `"loss":
    false` is context without loss.

    Args:
        sample: the sample; other fields are ignored.
        needs_answer: require an assistant's turn with loss; false for prompts.

    Raises:
        DataError: naming the field and its value, for anything else, and if the numbers of
            positions and media differ.
    """
    messages = _messages(sample)
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if needs_answer and all(turn.role != "assistant" for turn in turns):
        raise DataError(
            f"no assistant turn among the roles {[turn.role for turn in turns]}: at least one is "
            "needed"
        )
    if needs_answer and not any(turn.loss for turn in turns if turn.role == "assistant"):
        raise DataError("no assistant turn is trained: at least one without loss false is needed")
    if not any(turn.parts for turn in turns):
        raise DataError("every turn of messages is empty: at least one needs content")
    for kind in MEDIA_KINDS:
        _check_count(sample, turns, kind)
    return turns


def check_turn_fields(message: Mapping[str, Any], field: str) -> None:
    """Refuse fields of a turn whose content would be lost.

    Raises:
        DataError: naming the field.
    """
    for name, reason in REFUSED_FIELDS.items():
        if message.get(name) not in (None, "", [], {}):
            raise DataError(f"{field}.{name} is {message[name]!r:.80}: {reason}")


def count_places(content: Any, kind: str) -> int:
    """Count positions of media of a kind in the content of a user's or the system's turn."""
    if isinstance(content, str):
        return sum(part == MediaPart(kind) for part in _tagged_parts(content))
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, Mapping) and part.get("type") == kind for part in content)


def _messages(sample: Mapping[str, Any]) -> list[Any]:
    if not isinstance(sample, Mapping):
        raise DataError(
            f"the sample is {type(sample).__name__}: an object with the field messages is needed"
        )
    # Tables hold a null for every column that a row does not use: null is absent.
    filled = {name for name in sample if sample[name] is not None}
    fields = [name for name in CHAT_FIELDS if name in filled]
    if not fields:
        null = "".join(f", {name} is null" for name in CHAT_FIELDS if name in sample)
        raise DataError(
            f"no field messages among {sorted(filled)}{null}: a list of {{role, content}} is needed"
        )
    messages = sample[fields[0]]
    # Two equal fields are harmless; of different ones, one would be lost.
    if any(sample[name] != messages for name in fields):
        raise DataError("messages and conversations are both given, and differ: one is needed")
    if not isinstance(messages, list):
        raise DataError(
            f"messages is {type(messages).__name__}: a list of {{role, content}} is needed"
        )
    if not messages:
        raise DataError("messages is an empty list: at least one turn is needed")
    return messages


def _turn(message: Any, field: str) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"{field} has {message!r:.80}: the fields role and content are needed")
    check_turn_fields(message, field)
    if not {"role", "content"} <= set(message):
        raise DataError(f"{field} has {sorted(message)}: the fields role and content are needed")
    if not isinstance(message["role"], str) or message["role"] not in ROLES:
        raise DataError(f"{field}.role is {message['role']!r}; known roles: {', '.join(ROLES)}")
    role = ROLES[message["role"]]
    content = message["content"]
    parts = merge_texts(_parts(content, f"{field}.content", literal=role == "assistant"))
    check_unicode(parts, f"{field}.content")
    loss = _loss(message, field, is_answer=role == "assistant")
    return Turn(role, parts, loss, listed=isinstance(content, list))


def _loss(message: Mapping[str, Any], field: str, *, is_answer: bool) -> bool:
    """Parse the loss marks of a turn; raises DataError naming a mark that is invalid."""
    marks = {name: message[name] for name in LOSS_MARKS if message.get(name) is not None}
    for name, value in marks.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"{field}.{name} is {value!r:.80}: true, 1, false or 0 is needed")
        # A weight of 1 on any turn changes nothing.
        if value and not is_answer and name != "weight":
            raise DataError(f"{field}.{name} is {value!r}: only assistants' turns are trained")
    if not is_answer:
        return True
    # Several marks must agree: which of them counts is undefined.
    if len({bool(value) for value in marks.values()}) > 1:
        raise DataError(f"{field} says by {marks} both that it is trained and that it is not")
    return all(marks.values())


def _parts(content: Any, field: str, *, literal: bool) -> list[TextPart | MediaPart]:
    if isinstance(content, str):
        if literal:
            return [TextPart(content)]
        return _tagged_parts(content)
    if isinstance(content, list):
        return [_part(part, f"{field}[{index}]") for index, part in enumerate(content)]
    raise DataError(f"{field} is {type(content).__name__}: a string or a list of parts is needed")


def _tagged_parts(text: str) -> list[TextPart | MediaPart]:
    parts: list[TextPart | MediaPart] = []
    position = 0
    for tag in _TAG.finditer(text):
        escape, kind = tag.groups()
        parts.append(TextPart(text[position : tag.start()]))
        if escape:
            parts.append(TextPart(f"<{kind}>"))
        else:
            parts.append(MediaPart(kind))
        position = tag.end()
    return [*parts, TextPart(text[position:])]


def _part(part: Any, field: str) -> TextPart | MediaPart:
    kind = None
    if isinstance(part, Mapping):
        kind = part.get("type")
    if kind in MEDIA_KINDS:
        return MediaPart(kind)
    if kind != "text":
        raise DataError(f"{field} is {part!r:.80}: its type must be text, image or video")
    if not isinstance(part.get("text"), str):
        raise DataError(f"{field}.text is {part.get('text')!r:.80}: a string is needed")
    return TextPart(part["text"])


def merge_texts(parts: Sequence[TextPart | MediaPart]) -> list[TextPart | MediaPart]:
    """Join adjacent texts and drop empty ones."""
    merged: list[TextPart | MediaPart] = []
    for part in parts:
        if isinstance(part, TextPart) and merged and isinstance(merged[-1], TextPart):
            merged[-1] = TextPart(merged[-1].text + part.text)
        elif part != TextPart(""):
            merged.append(part)
    return merged


def check_unicode(parts: Sequence[TextPart | MediaPart], field: str) -> None:
    """Raise DataError, naming the field, for lone surrogates, which no tokenizer can encode."""
    for part in parts:
        if isinstance(part, TextPart) and (surrogate := re.search("[\ud800-\udfff]", part.text)):
            raise DataError(
                f"{field} has the lone surrogate {surrogate.group()!r} at character "
                f"{surrogate.start()}: text must be valid Unicode"
            )


def _check_count(sample: Mapping[str, Any], turns: list[Turn], kind: str) -> None:
    field = f"{kind}s"
    media = sample.get(field) or []
    if not isinstance(media, list):
        raise DataError(f"{field} is {type(media).__name__}: a list is needed")
    places = sum(part == MediaPart(kind) for turn in turns for part in turn.parts)
    if places != len(media):
        raise DataError(
            f"messages has {places} places for {field} (<{kind}>) and {field} lists {len(media)}"
        )
