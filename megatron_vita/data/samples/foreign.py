"""Conversion of third-party records to our samples.

A record is a conversation (`messages`, `conversations`, ...), a question and an answer in separate
fields, a caption of media, or raw text; with media, a system prompt, marks of trained turns, and a
rejected answer.
Nothing in it is ignored: a field is used, or the record is refused by the field's name.
"""

from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, NamedTuple

from megatron_vita.data.samples.foreign_pairs import take_preference
from megatron_vita.data.samples.foreign_turns import (
    Chat,
    decode_turns,
    literal,
    place_media,
    read_chat,
)
from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.data.samples.media_fields import (
    FIELDS,
    Media,
    agreed_media,
    has_media_fields,
    is_filled,
    refuse_unread,
    take_media,
)
from megatron_vita.data.samples.records import REJECTED
from megatron_vita.data.samples.refused_fields import (
    refuse_grades,
    refuse_parts_of_videos,
    refuse_turns,
    refuse_what_is_not_learnt,
)
from megatron_vita.errors import DataError

DEFAULT_PROMPT = "Describe it."
CHAT_FIELDS = ("messages", "conversations", "conversation", "texts", "chatml")
PAIRS = (
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("user", "assistant"),
    ("message_1", "message_2"),
)
CAPTIONS = ("caption", "text", "txt")
SYSTEMS = (
    "system",
    "system_prompt",
    "system_message",
    "system_instruction",
    "meta_instruction",
)
_REST = ("input", "context")
"""Rest of an instruction: Alpaca's name for it, and Dolly's."""
_CONTEXT = ("input", "history", "choices", "options", "context", "passage", "hint")
"""Fields that belong to a question: without them it would be another one."""
_WHICH = (
    "several media, {}, and no place for each in its text: name those that are meant by images, "
    "videos or ignore in members.yaml"
)
_GROUNDING = ("<bbox>", "<ref-object>")  # ms-swift's tags for `objects`


class Beside(NamedTuple):
    """Media that accompany a record in files; `is_listed`: a rule states that all are used."""

    media: Media
    is_listed: bool = False


class _Turns(NamedTuple):
    """Turns of a record as they are, and the fields that held them."""

    turns: Any
    names: set[str]


def sample_of(
    record: Mapping[str, Any],
    *,
    prompt: str | None = DEFAULT_PROMPT,
    ignore: Collection[str] = (),
    literal_tags: bool = False,
    beside: Beside | None = None,
) -> dict[str, Any]:
    """Convert a record to a sample: messages or a text, with images and videos as the record has
    them.

    Args:
        record: a JSON object, or a row of a table.
        prompt: user's question for records with only a caption; None: `text` is raw text, and there
            are no captions.
        ignore: fields to ignore.
        literal_tags: `<image>` is ordinary text in records without a field for media.
        beside: media that accompany the record in files of their own.

    Raises:
        DataError: naming the field that is not understood.
    """
    fields = {name: value for name, value in record.items() if name not in ignore}
    fields = _opened({name: value for name, value in fields.items() if value is not None})
    columns = sorted(map(str, fields))
    fields, rejected = take_preference(fields, chats=CHAT_FIELDS)
    refuse_what_is_not_learnt(fields)
    # A field for media, be it null, says that tags are meant as places of media.
    literal_tags = literal_tags and not has_media_fields(record.keys() - set(ignore))
    # Before all else, so that no field of media is read as text or turns.
    media = take_media(fields)
    found = _find_turns(fields)
    chat = Chat([], {})
    if found is not None:
        refuse_grades(fields)
        chat = read_chat(found.turns)
    media = agreed_media(media, chat.media, names=("the sample", "its turns"))
    is_clear = True
    # Several files that neither the record nor a rule names may not all be meant.
    if beside is not None:
        is_clear = beside.is_listed or any(media.values()) or _count(beside.media) < 2
        media = _media_beside(beside.media, named=media)
    if found is not None:
        messages = _with_system(fields, chat.messages)
        sample = _placed(messages, media, literal_tags=literal_tags, add=is_clear)
    else:
        sample = _captioned(fields, media, prompt=prompt, columns=columns, add=is_clear)
    used = {*CAPTIONS, *SYSTEMS}
    if found is not None:
        used |= found.names
    # What is not used must hold neither media nor turns, which would be lost.
    rest = {name: value for name, value in fields.items() if name not in used}
    refuse_unread(rest, media)
    refuse_turns(rest)
    # A video whose content comes with the record is cut already: times tell where it was.
    if beside is None and any(isinstance(video, str) for video in media["videos"]):
        refuse_parts_of_videos(rest)
    if rejected is not None:
        sample[REJECTED] = rejected
    return _kept(fields) | sample


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that a sample takes over as they are."""
    kept = {}
    if isinstance(fields.get("id"), str | int | float):
        kept["id"] = fields["id"]
    if "weight" in fields:
        kept["weight"] = fields["weight"]
    return kept


def caption_record(
    caption: Any, media: Mapping[str, list[Any]], *, prompt: str, name: str
) -> dict[str, Any]:
    """Build a sample of media and a caption that answers a question; raw text without media.

    Raises:
        DataError: naming the caption by `name`: it is empty or not text.
    """
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{name}: the caption is {caption!r:.80}: text is needed")
    filled: Media = {field: media[field] for field in FIELDS if media.get(field)}
    if not filled:
        return {"text": caption.strip()}
    turns = [
        {"role": "user", "content": literal(prompt)},
        {"role": "assistant", "content": caption.strip()},
    ]
    return {"messages": place_media(turns, filled), **filled}


def _media_beside(media: Media, *, named: Media) -> Media:
    """Order media in files as the record names them, if it does."""
    ordered: Media = {}
    for field in FIELDS:
        names = named[field]
        files = media[field]
        if names and len(names) != len(files):
            raise DataError(f"it names {len(names)} {field}, {names!r:.80}; it comes with {files}")
        by_name = {str(file).rpartition("/")[2]: file for file in files}
        found = [by_name.get(str(name).rpartition("/")[2]) for name in names]
        whole = [file for file in found if file is not None]
        # Names that do not match the files, as after a renaming, tell no order: keep the files'.
        ordered[field] = list(files)
        if len(set(whole)) == len(files):
            ordered[field] = whole
    return ordered


def _opened(fields: dict[str, Any]) -> dict[str, Any]:
    """Merge the fields of a `json` column, as in tables made of webdatasets, into the record."""
    inner = fields.get("json")
    if isinstance(inner, str | bytes):
        try:
            inner = parse_json(inner)
        except DataError as error:
            raise DataError(f"json is {inner!r:.80}: {error}") from error
    # Some webdatasets store the turns alone.
    if isinstance(inner, list):
        inner = {"conversations": inner}
    if not isinstance(inner, Mapping):
        return fields
    outer = {name: value for name, value in fields.items() if name != "json"}
    inner = {name: value for name, value in inner.items() if value is not None}
    for name in outer.keys() & inner.keys():
        if outer[name] != inner[name]:
            raise DataError(f"{name} and json.{name} are both given, and differ: one is needed")
    return outer | inner


def _find_turns(fields: Mapping[str, Any]) -> _Turns | None:
    """Turns of a record: a list, or built from a question and an answer; None if it has none."""
    chats = [name for name in CHAT_FIELDS if is_filled(fields.get(name))]
    if any(fields[name] != fields[chats[0]] for name in chats):
        raise DataError(f"{' and '.join(chats)} are both given, and differ: one is needed")
    if chats:
        if is_filled(fields.get("history")):
            raise DataError(f"history is given beside {chats[0]}: {fields['history']!r:.80}")
        _refuse_loose_texts(fields, chats)
        return _Turns(fields[chats[0]], set(chats))
    if name := next((name for name in CHAT_FIELDS if fields.get(name) == []), None):
        raise DataError(f"{name} is an empty list: at least one turn is needed")
    pairs = [pair for pair in PAIRS if set(pair) <= fields.keys()]
    # Beside an instruction, an input is the rest of it.
    if "instruction" in fields and len(pairs) > 1:
        pairs = [pair for pair in pairs if pair != ("input", "output")]
    if len(pairs) > 1:
        told = " and ".join("/".join(pair) for pair in pairs)
        raise DataError(f"{told} are both given: one question and one answer are needed")
    if pairs:
        return _turns_of_fields(fields, *pairs[0])
    return None


def _refuse_loose_texts(fields: Mapping[str, Any], chats: list[str]) -> None:
    """Refuse a list of texts unless its name says that they are a conversation: it may be captions,
    or the paragraphs of a document."""
    turns = decode_turns(fields[chats[0]])
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
        return
    if not set(chats) & {"conversations", "conversation"}:
        raise DataError(
            f"{chats[0]} is a list of texts, {turns[0]!r:.80} the first: turns with their roles are "
            "needed; texts of the user and the assistant in turn are read from conversations"
        )


def _turns_of_fields(fields: Mapping[str, Any], asker: str, answerer: str) -> _Turns:
    used = {asker, answerer}
    question = fields[asker]
    answer = fields[answerer]
    for name in (asker, answerer):
        if not isinstance(fields[name], str):
            raise DataError(f"{name} is {fields[name]!r:.80}: text is needed, one for a question")
    rest = next((name for name in _REST if is_filled(fields.get(name))), "")
    if asker == "instruction" and isinstance(fields.get(rest), str):
        used.add(rest)
        question = "\n".join(filter(None, (question, fields[rest])))
    turns: list[Any] = []
    if is_filled(fields.get("history")):
        used.add("history")
        turns = _history(fields["history"])
    for name in _CONTEXT:
        if name not in used and is_filled(fields.get(name)):
            raise DataError(
                f"{name} is {fields[name]!r:.80}: it is not read beside {asker} and {answerer}; "
                "write it into the question, or leave it out (import has --ignore)"
            )
    return _Turns([*turns, {"user": question, "assistant": answer}], used)


def _history(history: Any) -> list[Any]:
    """Convert earlier turns, given as pairs of question and answer or as turns."""
    if not isinstance(history, list):
        raise DataError(f"history is {history!r:.80}: a list of turns is needed")
    turns = []
    for i, item in enumerate(history):
        if isinstance(item, Mapping):
            turns.append(item)
        elif isinstance(item, list | tuple) and [*map(type, item)] == [str, str]:
            turns.append({"user": item[0], "assistant": item[1]})
        else:
            raise DataError(f"history[{i}] is {item!r:.80}: [question, answer] is needed")
    return turns


def _with_system(fields: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prepend the system prompt of a record to its messages."""
    text = " ".join(str(message["content"]) for message in messages)
    if is_filled(fields.get("objects")) and any(tag in text for tag in _GROUNDING):
        raise DataError(f"objects is {fields['objects']!r:.80}: boxes are not written into texts")
    return [*_system_turn(fields, messages), *messages]


def _placed(
    messages: list[dict[str, Any]], media: Media, *, literal_tags: bool, add: bool
) -> dict[str, Any]:
    """Combine messages and media; raises DataError if `add` is false and tags are missing."""
    filled: Media = {field: values for field, values in media.items() if values}
    if literal_tags and not filled:
        return {"messages": [_literal(message) for message in messages]}
    placed = place_media(messages, filled)
    if not add and placed != messages:
        raise DataError(_WHICH.format([*chain.from_iterable(filled.values())]))
    return {"messages": placed, **filled}


def _system_turn(fields: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System turn from a field of the record; empty if there is none or the messages have it."""
    names = [name for name in SYSTEMS if is_filled(fields.get(name))]
    if not names:
        return []
    name = names[0]
    if any(fields[other] != fields[name] for other in names):
        raise DataError(f"{' and '.join(names)} are both given, and differ: one is needed")
    turn = {"role": "system", "content": fields[name]}
    if not isinstance(fields[name], str):
        raise DataError(f"{name} is {fields[name]!r:.80}: text is needed")
    systems = [message for message in messages if message["role"] == "system"]
    if systems and systems[0] != turn:
        raise DataError(f"{name} and a system's turn are both given, and differ: one is needed")
    if systems:
        return []
    return [turn]


def _captioned(
    fields: Mapping[str, Any], media: Media, *, prompt: str | None, columns: list[str], add: bool
) -> dict[str, Any]:
    """Build a sample of a caption with its media, or of raw text."""
    known: tuple[str, ...] = ("text",)
    if prompt is not None:
        known = CAPTIONS
    names = [name for name in known if name in fields]
    if not names:
        pairs = ", ".join(f"{asker} and {answerer}" for asker, answerer in PAIRS)
        raise DataError(
            f"no text among the columns {columns}: a list of turns is needed in one of "
            f"{', '.join(CHAT_FIELDS)}; or {pairs}; or {', '.join(known)}"
        )
    if len({str(fields[name]).strip() for name in names}) > 1:
        raise DataError(f"{' and '.join(names)} are both given, and differ: one is needed")
    if not add:
        raise DataError(_WHICH.format([*chain.from_iterable(media.values())]))
    filled: Media = {field: values for field, values in media.items() if values}
    caption = fields[names[0]]
    system = _system_turn(fields, [])
    sample = {"text": caption, **filled}
    if prompt is not None:
        sample = caption_record(caption, filled, prompt=prompt, name=names[0])
    if system and "messages" not in sample:
        raise DataError(f"a system's turn, {system[0]['content']!r:.80}, is given beside raw text")
    if system:
        sample["messages"] = system + sample["messages"]
    return sample


def _count(media: Media) -> int:
    return sum(map(len, media.values()))


def _literal(message: dict[str, Any]) -> dict[str, Any]:
    is_read = message["role"] != "assistant" and isinstance(message["content"], str)
    if is_read:
        return message | {"content": literal(message["content"])}
    return message
