"""Conversion of third-party turns to our messages, with the media that they carry."""

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
from megatron_vita.data.samples.refused_fields import (
    refuse_partly_trained,
    refuse_parts_of_videos,
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

_INLINE = re.compile(r"<(img|video)>\s*([^<>\n]+?)\s*</\1>")  # as in Qwen-VL's data
_INLINE_FIELDS: dict[str, Field] = {"img": "images", "video": "videos"}
_OTHER_TAGS = re.compile(
    r"<(image|video)[ _-]?\d+>|<\|(image|video)(_\d+|_pad)?\|>|<(image|video)here>"
    r"|\[(image|img|video)\]|<(img|image|video)>",  # the last matches other cases than ours
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
    """A conversation as messages of {role, content}, with the media of its turns."""

    messages: list[dict[str, Any]]
    media: Media


def read_chat(turns: Any) -> Chat:
    """Convert turns to messages.

    Turns are {from, value}, {role, content}, or pairs such as {user, assistant}, or texts of the
    user and the assistant in turn; text that holds a JSON list of these is parsed.

    Raises:
        DataError: naming the turn, for anything else. Unknown roles are left to `check_messages`.
    """
    turns = decode_turns(turns)
    if not isinstance(turns, list):
        raise DataError(f"the conversation is {type(turns).__name__}: a list of turns is needed")
    if turns and all(isinstance(turn, str) for turn in turns):
        turns = _in_turn(turns)
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
    """Add tags for media of a kind without any tag, before the text of the first user's turn.

    Raises:
        DataError: an answer, or a tag of another format, may be the position of a medium.
    """
    # Media are input: only turns of users and of the system can hold them.
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
    return [*messages[:first], messages[first] | {"content": content}, *messages[first + 1 :]]


def literal(text: str) -> str:
    """Escape the media tags in a text."""
    for tag in TAGS.values():
        text = text.replace(tag, f"\\{tag}")
    return text


def decode_turns(turns: Any) -> Any:
    """Parse a conversation that a table without lists holds as JSON text."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            return parse_json(turns)
        except DataError as error:
            raise DataError(f"the conversation is not a list, but text: {error}") from error
    return turns


def _in_turn(texts: list[str]) -> list[dict[str, str]]:
    """Give texts to the user and the assistant in turn, as LIMA has them."""
    if len(texts) % 2:
        raise DataError(
            f"the conversation is a list of {len(texts)} texts: one more is needed, or one less, "
            "for each question to have its answer"
        )
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


def _read_turn(turn: Any, name: str) -> list[tuple[dict[str, Any], Media]]:
    """Convert a turn to a message, or a pair to two, each with its media."""
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
    """Build a message with its media; `fields` are the other fields of the turn."""
    marks = _marks(fields)
    media = take_media(fields)
    refuse_unread(fields, media)
    refuse_partly_trained(fields, f"{name}.")
    if media["videos"]:
        refuse_parts_of_videos(fields, f"{name}.")
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
    """Remove the loss marks from a turn's fields and return them."""
    return {mark: fields.pop(mark) for mark in LOSS_MARKS if mark in fields}


def _read_parts(parts: list[Any], name: str) -> tuple[list[Any], Media]:
    """Convert the parts of a content, and collect the media in them."""
    media: Media = {field: [] for field in FIELDS}
    read: list[Any] = []
    for i, part in enumerate(parts):
        kind = None
        if isinstance(part, Mapping):
            kind = part.get("type")
        field = None
        if isinstance(kind, str):
            field = _PART_KINDS.get(kind)
        if field is not None:
            media[field] += _values_of_part(part, field, f"{name}.content[{i}]")
            read.append({"type": KINDS[field], "index": part.get("index")})
        elif isinstance(part, Mapping) and kind in _TEXT_PARTS:
            read.append({"type": "text", "text": part.get("text")})
        else:
            read.append(part)
    return read, media


def _values_of_part(part: Mapping[str, Any], field: Field, name: str) -> list[Value]:
    """Medium that a part holds; none if it only marks the position of one of the sample's."""
    rest = {key: value for key, value in part.items() if key not in ("type", "text", "index")}
    named = (KINDS[field], f"{KINDS[field]}_url", "url", "path", "bytes", "base64", "data")
    filled = [key for key in named if is_filled(rest.get(key))]
    values = [value for key in filled for value in values_of(rest.pop(key), f"{name}.{key}")]
    if len(values) > 1:
        raise DataError(f"{name} holds {len(values)} media in {filled}: one is needed")
    refuse_unread(rest, {field: values})
    if field == "videos":
        refuse_parts_of_videos(rest, f"{name}.")
    return values


def _check_indexes(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise DataError if parts with image indices do not use the images in order."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]
    indexes = [part.pop("index", None) for part in images]
    if any(index not in (None, place) for place, index in enumerate(indexes)):
        raise DataError(f"the images of the turns have the indexes {indexes}: 0, 1, ... are needed")


def _read_inline(text: str, name: str) -> tuple[str, Media]:
    """Replace `<img>path</img>` in a user's text by tags; returns the text and the media."""
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
    """Raise DataError if a conversation without our tags seems to mark positions of media."""
    for i, message in enumerate(messages):
        content = message["content"]
        text = ""
        if isinstance(content, str):
            text = content
        if message["role"] == "assistant":
            # A tag in an answer's text is literal, and may yet be meant as the position.
            places = text.count(TAGS[field])
            if isinstance(content, list):
                places = count_places(content, KINDS[field])
            if places:
                raise DataError(
                    f"turn {i}, an answer, has {TAGS[field]}, no question has: media are read, "
                    "not generated, and belong in the turns of users"
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
    """Replace <image> by <video>, as LLaVA's video sets write it."""
    content = message["content"]
    if message["role"] == "assistant" or not isinstance(content, str) or "<video>" in content:
        return message
    return message | {"content": content.replace("<image>", "<video>")}


def _role(role: Any) -> Any:
    if not isinstance(role, str):
        return role
    return ROLES.get(role.lower(), OTHER_ROLES.get(role.lower(), role))
