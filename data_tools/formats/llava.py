"""LLaVA's JSON: objects with `image` or `video` (a path or several) and `conversations` of human
and gpt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.formats.base import Candidate, Setting, find_files
from data_tools.formats.objects import read_objects
from megatron_vita.data.samples.third_party import chat_messages, place_media
from megatron_vita.errors import DataError


def list_sources(paths: list[Path]) -> list[Path]:
    """JSON files (one array) and JSONL files."""
    return find_files(paths, ".json", ".jsonl")


def read(source: Path, setting: Setting) -> Iterator[Candidate]:
    """The objects of a file."""
    return read_objects(source, _sample)


def _sample(found: dict[str, Any]) -> dict[str, Any]:
    media = {field: _paths(found, field) for field in ("images", "videos")}
    messages = chat_messages(found.get("conversations", found.get("messages")))
    if media["videos"] and not media["images"]:
        # LLaVA's video sets say <image> where the video stands.
        messages = [_with_video_tag(message) for message in messages]
    sample = {
        "messages": place_media(messages, media),
        **{field: paths for field, paths in media.items() if paths},
    }
    return {"id": found["id"], **sample} if "id" in found else sample


def _paths(found: dict[str, Any], field: str) -> list[str]:
    paths = found.get(field, found.get(field[:-1])) or []
    if not isinstance(paths, str | list):
        raise DataError(f"{field[:-1]} is {paths!r:.80}: a path or a list of paths is needed")
    return [paths] if isinstance(paths, str) else paths


def _with_video_tag(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if message["role"] == "assistant" or not isinstance(content, str) or "<video>" in content:
        return message
    return message | {"content": content.replace("<image>", "<video>")}
