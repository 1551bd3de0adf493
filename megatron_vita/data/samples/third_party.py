"""Samples of other makers as conversations of ours: turns of other names, captions, tar members
without a record.

In a plain webdataset tar, the files of a sample share a key: `KEY.jpg` with `KEY.txt`, a caption,
or with `KEY.json`, which holds a conversation (a list of turns, alone or as messages, conversations
or conversation; Megatron-Energon's chat samples are such) or an object with a caption. A file
`members.yaml` beside the shards may say otherwise.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_vita.config.yaml_file import read_yaml, resolved
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.text.conversation import ROLES

RULE_FILE = "members.yaml"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
VIDEO_SUFFIXES = (
    "mp4",
    "mkv",
    "webm",
    "avi",
    "mov",
    "m4v",
    "mpg",
    "mpeg",
    "ts",
    "flv",
    "wmv",
    "frames.zip",
)
TEXT_SUFFIXES = ("json", "txt")
CHAT_FIELDS = ("messages", "conversations", "conversation", "texts")
OTHER_ROLES = {"chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
TAGS = {"images": "<image>", "videos": "<video>"}


@dataclass(frozen=True, kw_only=True)
class MemberRule:
    """How the members of a tar become a conversation: the fields of `members.yaml`.

    `text` is the suffix of the member with the text (empty: `json`, else `txt`), `caption` the
    field of a JSON object that holds a caption, `prompt` what the user asks where there is only a
    caption.
    """

    text: str = ""
    caption: str = "caption"
    prompt: str = "Describe it."


def read_rule(folder: Path) -> MemberRule:
    """Read the rule for the shards of a folder; the default where it has no `members.yaml`.

    Raises:
        ConfigError: naming the file and the field or key that is wrong.
    """
    path = folder / RULE_FILE
    if not path.exists():
        return MemberRule()
    values = resolved(read_yaml(path, what="rule")) or {}
    known = [field.name for field in fields(MemberRule)]
    if not isinstance(values, dict) or not set(values) <= set(known):
        raise ConfigError(f"{path}: it has {values!r:.200}; known fields: {', '.join(known)}")
    if wrong := [name for name, value in values.items() if not isinstance(value, str)]:
        raise ConfigError(f"{path}: {wrong[0]} is {values[wrong[0]]!r:.80}: text is needed")
    return MemberRule(**values)


def rule_stamp(rule: MemberRule) -> str:
    """What tells one rule from another."""
    return json.dumps(asdict(rule), sort_keys=True)


def record_of_members(
    names: Sequence[str], read: Callable[[str], bytes], *, rule: MemberRule
) -> dict[str, Any]:
    """The record of a sample whose members are `names` (`KEY.suffix`), of which `read` gives the
    bytes.

    DataError, naming the member, if there is no text or it is neither a conversation nor a caption.
    """
    by_suffix = {suffix_of(name): name for name in names}
    media = {
        field: [by_suffix[suffix] for suffix in by_suffix if suffix.endswith(endings)]
        for field, endings in (("images", IMAGE_SUFFIXES), ("videos", VIDEO_SUFFIXES))
    }
    suffixes = [rule.text] if rule.text else TEXT_SUFFIXES
    name = next((by_suffix[suffix] for suffix in suffixes if suffix in by_suffix), None)
    if name is None:
        raise DataError(
            f"no text among {sorted(by_suffix)}: a member with the suffix {' or '.join(suffixes)} is needed"
        )
    content = _parsed(read(name), name) if name.endswith(".json") else _decoded(read(name), name)
    turns = _turns_in(content)
    if turns is not None:
        return {"messages": place_media(chat_messages(turns), media), **media}
    caption = (
        content.get(rule.caption, content.get("text")) if isinstance(content, dict) else content
    )
    return caption_record(caption, media, prompt=rule.prompt, name=name)


def caption_record(
    caption: Any, media: Mapping[str, list[str]], *, prompt: str, name: str
) -> dict[str, Any]:
    """A question about media and a caption that answers it; raw text if there are no media.
    DataError by `name`."""
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(f"{name}: the caption is {caption!r:.80}: text is needed")
    if not any(media.values()):
        return {"text": caption.strip()}
    turns = [
        {"role": "user", "content": literal(prompt)},
        {"role": "assistant", "content": caption.strip()},
    ]
    return {"messages": place_media(turns, media), **media}


def chat_messages(turns: Any) -> list[dict[str, Any]]:
    """Turns as {role, content}: of {from, value}, of {role, content}, or of {user, assistant}
    pairs.

    DataError, naming the turn, for anything else; roles that nobody knows are left to
    `check_messages`.
    """
    if not isinstance(turns, list):
        raise DataError(f"the conversation is {type(turns).__name__}: a list of turns is needed")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise DataError(f"turn {i} is {turn!r:.80}: an object is needed")
        if "user" in turn and "assistant" in turn:
            messages += [{"role": role, "content": turn[role]} for role in ("user", "assistant")]
        elif {"from", "value"} <= set(turn):
            messages.append({"role": _role(turn["from"]), "content": turn["value"]})
        elif {"role", "content"} <= set(turn):
            messages.append({"role": _role(turn["role"]), "content": turn["content"]})
        else:
            raise DataError(
                f"turn {i} has {sorted(map(str, turn))}: from and value, or role and content are needed"
            )
    return messages


def place_media(
    messages: list[dict[str, Any]], media: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """The messages with a tag for each medium: where no user turn has one, tags go before the first
    user's text."""
    users = [message for message in messages if message["role"] != "assistant"]
    if not users or any(not isinstance(message["content"], str) for message in users):
        return messages
    missing = "".join(
        f"{tag}\n" * len(media.get(field, ()))
        for field, tag in TAGS.items()
        if not any(tag in message["content"].replace(f"\\{tag}", "") for message in users)
    )
    first = next((message for message in users if message["role"] == "user"), users[0])
    return [
        message | {"content": missing + message["content"]} if message is first else message
        for message in messages
    ]


def literal(text: str) -> str:
    """Text in which tags are not places of media."""
    for tag in TAGS.values():
        text = text.replace(tag, f"\\{tag}")
    return text


def suffix_of(name: str) -> str:
    """What follows the first dot of a member's file name, in lower case: webdataset's rule for what
    it holds."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _turns_in(content: Any) -> list[Any] | None:
    if isinstance(content, dict):
        content = next((content[field] for field in CHAT_FIELDS if field in content), None)
    return content if isinstance(content, list) else None


def _role(role: Any) -> Any:
    return ROLES.get(role, OTHER_ROLES.get(role, role)) if isinstance(role, str) else role


def _parsed(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not JSON: {error}") from error


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8: byte {data[error.start]:#x} at {error.start}"
        ) from error
