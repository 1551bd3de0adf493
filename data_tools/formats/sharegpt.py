"""ShareGPT's JSON: `conversations` of human and gpt, perhaps with `system`, `images` and
`videos`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats.base import Candidate, Setting
from data_tools.formats.objects import read_objects
from megatron_vita.data.samples.third_party import chat_messages, literal, place_media
from megatron_vita.errors import DataError


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The objects of a file."""
    return read_objects(source, _sample)


def _sample(found: dict[str, Any]) -> dict[str, Any]:
    messages = chat_messages(found.get("conversations", found.get("messages")))
    if found.get("system"):
        messages = [{"role": "system", "content": found["system"]}, *messages]
    media = {field: found.get(field) or [] for field in ("images", "videos")}
    if wrong := [field for field, paths in media.items() if not isinstance(paths, list)]:
        raise DataError(f"{wrong[0]} is {media[wrong[0]]!r:.80}: a list of paths is needed")
    if any(media.values()):
        messages = place_media(messages, media)
    else:  # a text may well speak of <image>, as HTML does
        messages = [_literal(message) for message in messages]
    sample = {"messages": messages, **{field: paths for field, paths in media.items() if paths}}
    return {"id": found["id"], **sample} if "id" in found else sample


def _literal(message: dict[str, Any]) -> dict[str, Any]:
    is_read = message["role"] != "assistant" and isinstance(message["content"], str)
    return message | {"content": literal(message["content"])} if is_read else message
