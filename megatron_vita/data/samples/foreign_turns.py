"""Turns of other makers as turns of ours, with the media that they carry."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.data.samples.media_fields import (
    FIELDS,
    KINDS,
    Field,
    Media,
    Value,
    is_filled,
    is_medium,
    refuse_unread,
    take_media,
    values_of,
)
from megatron_vita.errors import DataError
from megatron_vita.text.conversation import (
    LOSS_MARKS,
    ROLES,
    check_turn_fields,
    count_places,
)

OTHER_ROLES = {"chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
TAGS: dict[Field, str] = {"images": "<image>", "videos": "<video>"}
PAIRS = (("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("question", "answer"))
ROLE_FIELDS = ("role", "from")
CONTENT_FIELDS = ("content", "value")

_INLINE = re.compile(r"<(img|video)>\s*([^<>\n]+?)\s*</\1>")  # as Qwen-VL's data has them
_INLINE_FIELDS: dict[str, Field] = {"img": "images", "video": "videos"}
_OTHER_TAGS = re.compile(
    r"<(image|video)[ _-]?\d+>|<\|(image|video)(_\d+|_pad)?\|>|<(image|video)here>"
    r"|\[(image|img|video)\]|<(img|image|video)>",  # the last in other letters than ours
    re.IGNORECASE,
)
_DATA_URL = re.compile(r"data:(image|video|audio)/[\w.+-]+;base64,")
_PART_KINDS: dict[str, Field] = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "video": "videos",
    "video_url": "videos",
}
_TEXT_PARTS = ("text", "input_text", "output_text")


class Chat(NamedTuple):
    """A conversation as messages of {role, content}, with the media that stood in its turns."""

    messages: list[dict[str, Any]]
    media: Media


def read_chat(turns: Any) -> Chat:
    """Turns as messages: of {from, value}, of {role, content}, or of pairs such as {user,
    assistant}; a text that holds a JSON list of them is read too.

    Raises:
        DataError: naming the turn, for anything else. Roles that nobody knows are left to
            `check_messages`.
    """
    turns = _decoded(turns)
    if not isinstance(turns, list):
        raise DataError(f"the conversation is {type(turns).__name__}: a list of turns is needed")
    messages: list[dict[str, Any]] = []
    media: Media = {field: [] for field in FIELDS}
    for i, turn in enumerate(turns):
        for message, its_media in _read_turn(turn, f"turn {i}"):
            messages.append(message)
            for field in FIELDS:
                media[field] += its_media.get(field, [])
    _check_indexes(messages)
    return Chat(messages, media)


def place_media(
    messages: list[dict[str, Any]], media: Mapping[str, Sequence[Value]]
) -> list[dict[str, Any]]:
    """The messages with a place for each medium: where no user's or system's turn has one of a
    kind, before the first user's text.

    Raises:
        DataError: where an answer, or a tag of another maker, may be a medium's place.
    """
    readers = [i for i, message in enumerate(messages) if message["role"] != "assistant"]
    if not readers:
        return messages
    if not media.get("images") and media.get("videos"):
        messages = [_with_video_tags(message) for message in messages]
    lacking = [
        field
        for field in FIELDS
        if media.get(field)
        and not any(count_places(messages[i]["content"], KINDS[field]) for i in readers)
    ]
    for field in lacking:
        _refuse_other_places(messages, field)
    first = next((i for i in readers if messages[i]["role"] == "user"), readers[0])
    content = messages[first]["content"]
    for field in reversed(lacking):
        content = _with_places(content, field, len(media[field]))
    return [
        message | {"content": content} if i == first else message
        for i, message in enumerate(messages)
    ]


def literal(text: str) -> str:
    """Text in which tags are not places of media."""
    for tag in TAGS.values():
        text = text.replace(tag, f"\\{tag}")
    return text


def _decoded(turns: Any) -> Any:
    """What a text says that is a list in JSON, as tables without lists hold conversations."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            return parse_json(turns)
        except DataError as error:
            raise DataError(f"the conversation is no list, but text: {error}") from error
    return turns


def _read_turn(turn: Any, name: str) -> list[tuple[dict[str, Any], Media]]:
    """The message of a turn, or the two of a pair, each with its media."""
    if not isinstance(turn, Mapping):
        raise DataError(f"{name} is {turn!r:.80}: an object is needed")
    fields = {field: value for field, value in turn.items() if value is not None}
    check_turn_fields(fields, name)
    for asker, answerer in PAIRS:
        if asker in fields and answerer in fields:
            question = fields.pop(asker)
            answer = fields.pop(answerer)
            marks = _marks(fields)
            asked = _message("user", question, fields, name)
            return [asked, ({"role": "assistant", "content": answer, **marks}, {})]
    role = next((field for field in ROLE_FIELDS if field in fields), None)
    content = next((field for field in CONTENT_FIELDS if field in fields), None)
    if role is None or content is None:
        raise DataError(
            f"{name} has {sorted(map(str, fields))}: from and value, or role and content are needed"
        )
    return [_message(_role(fields.pop(role)), fields.pop(content), fields, name)]


def _message(
    role: Any, content: Any, fields: dict[str, Any], name: str
) -> tuple[dict[str, Any], Media]:
    """A message with its media, of which `fields` are the rest of the turn."""
    marks = _marks(fields)
    media = take_media(fields)
    refuse_unread(fields, media)
    if isinstance(content, list):
        content, of_parts = _read_parts(content, name)
        if any(of_parts.values()):
            return {"role": role, "content": content, **marks}, _only(of_parts, media, name)
    elif isinstance(content, str) and role != "assistant":
        content, inline = _read_inline(content, name)
        media = _only(inline, media, name)
    message = {"role": role, "content": content, **marks}
    if any(media.values()) and role != "assistant" and isinstance(content, str | list):
        (message,) = place_media([message], media)
    return message, media


def _only(first: Media, second: Media, name: str) -> Media:
    if any(first.values()) and any(second.values()):
        raise DataError(f"{name} holds media both in its content and beside it: one is needed")
    if any(first.values()):
        return first
    return second


def _marks(fields: dict[str, Any]) -> dict[str, Any]:
    """Take out what says whether a turn is trained, as our messages say it."""
    return {mark: fields.pop(mark) for mark in LOSS_MARKS if mark in fields}


def _read_parts(parts: list[Any], name: str) -> tuple[list[Any], Media]:
    """Parts of a content in our form, and the media that stood in them."""
    media: Media = {field: [] for field in FIELDS}
    read: list[Any] = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        field = _PART_KINDS.get(kind) if isinstance(kind, str) else None
        if field is not None:
            media[field] += _values_of_part(part, field, f"{name}.content[{i}]")
            read.append({"type": KINDS[field], "index": part.get("index")})
        elif isinstance(part, Mapping) and kind in _TEXT_PARTS:
            read.append({"type": "text", "text": part.get("text")})
        else:
            read.append(part)
    return read, media


def _values_of_part(part: Mapping[str, Any], field: Field, name: str) -> list[Value]:
    """The medium that a part holds; none where it is a place for one of the sample's."""
    rest = {key: value for key, value in part.items() if key not in ("type", "text", "index")}
    named = (KINDS[field], f"{KINDS[field]}_url", "url", "path", "bytes", "base64", "data")
    filled = [key for key in named if is_filled(rest.get(key))]
    values = [value for key in filled for value in values_of(rest.pop(key), f"{name}.{key}")]
    if len(values) > 1:
        raise DataError(f"{name} holds {len(values)} media in {filled}: one is needed")
    refuse_unread(rest, {field: values})
    return values


def _check_indexes(messages: Sequence[Mapping[str, Any]]) -> None:
    """DataError if parts that say which of the sample's images they are do not take them in order,
    as the parts of ours do."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]
    indexes = [part.pop("index", None) for part in images]
    if any(index not in (None, place) for place, index in enumerate(indexes)):
        raise DataError(f"the images of the turns have the indexes {indexes}: 0, 1, ... are needed")


def _read_inline(text: str, name: str) -> tuple[str, Media]:
    """A user's text with places for the media that it names by `<img>path</img>`; and the media."""
    media: Media = {field: [] for field in FIELDS}

    def place(match: re.Match[str]) -> str:
        field = _INLINE_FIELDS[match[1]]
        value = match[2]
        if not is_medium(value):
            return match[0]
        media[field].append(value)
        return TAGS[field]

    found = _INLINE.sub(place, text)
    if match := _DATA_URL.search(found):
        raise DataError(f"{name} has a medium in its text, {match[0]}...: name it in images")
    return found, media


def _refuse_other_places(messages: Sequence[Mapping[str, Any]], field: Field) -> None:
    """DataError if a conversation without places for media seems to have them after all."""
    for i, message in enumerate(messages):
        content = message["content"]
        text = content if isinstance(content, str) else ""
        if message["role"] == "assistant":
            places = text.count(TAGS[field]) or (
                count_places(content, KINDS[field]) if isinstance(content, list) else 0
            )
            if places:
                raise DataError(
                    f"turn {i}, an answer, has {TAGS[field]}, no question has: media are read, "
                    "not made, and stand in the turns of users"
                )
        elif match := _OTHER_TAGS.search(text.replace("<image>", "").replace("<video>", "")):
            raise DataError(
                f"turn {i} has {match[0]}: the place of a medium is written {TAGS[field]}"
            )


def _with_places(content: Any, field: Field, number: int) -> Any:
    if isinstance(content, list):
        return [{"type": KINDS[field]}] * number + content
    if isinstance(content, str):
        return f"{TAGS[field]}\n" * number + content
    return content


def _with_video_tags(message: dict[str, Any]) -> dict[str, Any]:
    """LLaVA's video sets say <image> where the video stands."""
    content = message["content"]
    if message["role"] == "assistant" or not isinstance(content, str) or "<video>" in content:
        return message
    return message | {"content": content.replace("<image>", "<video>")}


def _role(role: Any) -> Any:
    if not isinstance(role, str):
        return role
    return ROLES.get(role.lower(), OTHER_ROLES.get(role.lower(), role))
