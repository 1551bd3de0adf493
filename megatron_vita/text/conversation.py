"""Samples as conversations: who says what, and where images and videos stand."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vita.errors import DataError

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
"""Roles that samples may use, and what each is called here."""

MEDIA_KINDS = ("image", "video")

_TAG = re.compile(r"(\\?)<(image|video)>")


@dataclass(frozen=True)
class TextPart:
    """Literal text."""

    text: str


@dataclass(frozen=True)
class MediaPart:
    """The place of the next image or video of the sample; `kind` is "image" or "video"."""

    kind: str


@dataclass(frozen=True)
class Turn:
    """What one role says. Neighbouring texts are one part and no text is empty."""

    role: str
    parts: list[TextPart | MediaPart]


def check_messages(sample: Mapping[str, Any], *, needs_answer: bool = True) -> list[Turn]:
    """The turns of `{"messages": [{"role", "content"}, ...], "images": [...], "videos": [...]}`.

    `conversations` is read where there is no `messages`. Content is text or a list of parts:
    `{"type": "text", "text"}` (always literal), `{"type": "image"}`, `{"type": "video"}`. In the
    text of users and of the system, `<image>` and `<video>` are places of media and `\\<image>` is
    the literal tag; what an assistant says as text is always literal. `needs_answer` false accepts
    a conversation in which no assistant speaks yet, as a prompt is.

    Raises DataError, naming the field and its value, for anything else and where places and media
    differ in number.
    """
    messages = _messages(sample)
    turns = [_turn(message, f"messages[{index}]") for index, message in enumerate(messages)]
    if needs_answer and all(turn.role != "assistant" for turn in turns):
        raise DataError(
            f"no assistant turn among the roles {[turn.role for turn in turns]}: at least one is needed"
        )
    if not any(turn.parts for turn in turns):
        raise DataError("every turn of messages is empty: at least one needs content")
    for kind in MEDIA_KINDS:
        _check_count(sample, turns, kind)
    return turns


def _messages(sample: Mapping[str, Any]) -> list[Any]:
    if not isinstance(sample, Mapping):
        raise DataError(
            f"the sample is {type(sample).__name__}: an object with the field messages is needed"
        )
    messages = sample.get("messages", sample.get("conversations"))
    if messages is None:
        raise DataError(
            f"no field messages among {sorted(sample)}: a list of {{role, content}} is needed"
        )
    if not isinstance(messages, list):
        raise DataError(
            f"messages is {type(messages).__name__}: a list of {{role, content}} is needed"
        )
    if not messages:
        raise DataError("messages is an empty list: at least one turn is needed")
    return messages


def _turn(message: Any, field: str) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        found = sorted(message) if isinstance(message, Mapping) else repr(message)
        raise DataError(f"{field} has {found}: the fields role and content are needed")
    if not isinstance(message["role"], str) or message["role"] not in ROLES:
        raise DataError(f"{field}.role is {message['role']!r}; known roles: {', '.join(ROLES)}")
    role = ROLES[message["role"]]
    content = message["content"]
    if isinstance(content, str):
        parts: list[TextPart | MediaPart] = (
            [TextPart(content)] if role == "assistant" else _tagged_parts(content)
        )
    elif isinstance(content, list):
        parts = [_part(part, f"{field}.content[{index}]") for index, part in enumerate(content)]
    else:
        raise DataError(
            f"{field}.content is {type(content).__name__}: a string or a list of parts is needed"
        )
    return Turn(role, _joined(parts, f"{field}.content"))


def _tagged_parts(text: str) -> list[TextPart | MediaPart]:
    parts: list[TextPart | MediaPart] = []
    position = 0
    for tag in _TAG.finditer(text):
        escape, kind = tag.groups()
        parts.append(TextPart(text[position : tag.start()]))
        parts.append(TextPart(f"<{kind}>") if escape else MediaPart(kind))
        position = tag.end()
    return [*parts, TextPart(text[position:])]


def _part(part: Any, field: str) -> TextPart | MediaPart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in MEDIA_KINDS:
        return MediaPart(kind)
    if kind != "text":
        raise DataError(f"{field} is {part!r:.80}: its type must be text, image or video")
    if not isinstance(part.get("text"), str):
        raise DataError(f"{field}.text is {part.get('text')!r:.80}: a string is needed")
    return TextPart(part["text"])


def _joined(parts: list[TextPart | MediaPart], field: str) -> list[TextPart | MediaPart]:
    """Joins neighbouring texts, drops empty ones and refuses half characters, which no tokenizer
    can encode."""
    joined: list[TextPart | MediaPart] = []
    for part in parts:
        if isinstance(part, TextPart) and joined and isinstance(joined[-1], TextPart):
            joined[-1] = TextPart(joined[-1].text + part.text)
        elif part != TextPart(""):
            joined.append(part)
    for part in joined:
        if isinstance(part, TextPart) and (surrogate := re.search("[\ud800-\udfff]", part.text)):
            raise DataError(
                f"{field} has the lone surrogate {surrogate.group()!r} at character {surrogate.start()}: "
                "text must be valid Unicode"
            )
    return joined


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
