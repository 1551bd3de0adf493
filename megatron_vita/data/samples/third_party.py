"""Tar members without a record of ours as samples.

In a plain webdataset tar, the files of a sample share a key: `KEY.jpg` with `KEY.txt`, a caption,
or with `KEY.json`, which holds a conversation (a list of turns, alone or as messages, conversations
or conversation; Megatron-Energon's chat samples are such) or an object with a caption. A file
`members.yaml` beside the shards may say otherwise.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_vita.config.yaml_file import read_yaml, resolved
from megatron_vita.data.samples.foreign import DEFAULT_PROMPT, Beside, sample_of
from megatron_vita.data.samples.json_text import parse_json
from megatron_vita.data.samples.media_fields import FIELDS, KINDS, Media, Value
from megatron_vita.errors import ConfigError, DataError
from megatron_vita.media.kinds import kind_of_content, kind_of_name

RULE_FILE = "members.yaml"
TEXT_SUFFIXES = ("json", "txt")
ReadMember = Callable[[str], bytes]


@dataclass(frozen=True, kw_only=True)
class MemberRule:
    """How the members of a tar become a conversation: the fields of `members.yaml`.

    `text` is the suffix of the member with the text (empty: `json`, else `txt`), `caption` the
    field of a JSON object that holds a caption, `prompt` what the user asks where there is only a
    caption. `images` and `videos` are the suffixes of the members that are meant, in order, with
    alternatives as `jpg;png`; other media are then left out. `ignore` are patterns of suffixes of
    members, and of fields of JSON, that are left out.
    """

    text: str = ""
    caption: str = "caption"
    prompt: str = DEFAULT_PROMPT
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether a suffix or a field is left out."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)


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
    for name, value in values.items():
        is_list = isinstance(getattr(MemberRule, name), tuple)
        if is_list:
            value = [value] if isinstance(value, str) else value
            values[name] = tuple(value) if isinstance(value, list) else value
        needed = "a list of suffixes" if is_list else "text"
        items = values[name] if isinstance(values[name], tuple) else (values[name],)
        if is_list != isinstance(values[name], tuple) or not all(isinstance(i, str) for i in items):
            raise ConfigError(f"{path}: {name} is {value!r:.80}: {needed} is needed")
    return MemberRule(**values)


def rule_stamp(rule: MemberRule) -> str:
    """What tells one rule from another."""
    return json.dumps(asdict(rule), sort_keys=True)


def record_of_members(
    names: Sequence[str],
    read: ReadMember,
    *,
    rule: MemberRule,
    read_head: ReadMember | None = None,
) -> dict[str, Any]:
    """The record of a sample whose members are `names` (`KEY.suffix`), of which `read` gives the
    bytes, and `read_head` the first `HEAD` ones.

    Raises:
        DataError: naming the member, if there is no text or it is neither a conversation nor a
            caption, or a medium of which nothing says what is to become of it.
    """
    by_suffix = _by_suffix(names)
    texts = _text_members(by_suffix, rule)
    others = {suffix: name for suffix, name in by_suffix.items() if name not in texts}
    media = _media_members(others, rule, read_head or read)
    record: dict[str, Any] = {}
    for name in texts:
        record |= _read_text(name, read(name), rule)
    is_listed = bool(rule.images or rule.videos)
    try:
        sample = sample_of(record, prompt=rule.prompt, beside=Beside(media, is_listed))
    except DataError as error:
        raise DataError(f"{' and '.join(texts)}: {error}") from error
    sample.pop("id", None)  # the sample's key is its name
    if "text" in sample:
        return sample
    return {field: [] for field in FIELDS} | sample


def suffix_of(name: str) -> str:
    """What follows the first dot of a member's file name, in lower case: webdataset's rule for what
    it holds."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _by_suffix(names: Sequence[str]) -> dict[str, str]:
    by_suffix: dict[str, str] = {}
    for name in names:
        if (first := by_suffix.setdefault(suffix_of(name), name)) != name:
            raise DataError(f"the members {first} and {name} differ in the case of letters alone")
    return by_suffix


def _text_members(by_suffix: Mapping[str, str], rule: MemberRule) -> list[str]:
    suffixes = [rule.text.lower()] if rule.text else TEXT_SUFFIXES
    texts = [by_suffix[suffix] for suffix in suffixes if suffix in by_suffix]
    if not texts:
        raise DataError(
            f"no text among {sorted(by_suffix)}: a member with the suffix {' or '.join(suffixes)} "
            "is needed"
        )
    return texts


def _media_members(by_suffix: Mapping[str, str], rule: MemberRule, read_head: ReadMember) -> Media:
    """The members that are media of the sample. DataError by name for one that may or may not be."""
    if rule.images or rule.videos:
        listed = {"images": rule.images, "videos": rule.videos}
        return {
            field: [_listed(by_suffix, item, field) for item in listed[field]] for field in FIELDS
        }
    media: dict[str, list[Value]] = {"image": [], "video": []}
    for suffix, name in by_suffix.items():
        if rule.ignores(suffix):
            continue
        kind = kind_of_name(name)
        if kind in media:
            media[kind].append(name)
        elif kind or kind_of_content(read_head(name)):
            raise DataError(
                f"{name} holds {_told(kind, read_head(name))}: name it in images, videos or ignore "
                "of members.yaml"
            )
    return {field: media[KINDS[field]] for field in FIELDS}


def _listed(by_suffix: Mapping[str, str], item: str, field: str) -> str:
    """The member that an entry of the rule names."""
    suffixes = [suffix.strip().lower() for suffix in item.split(";")]
    found = [by_suffix[suffix] for suffix in suffixes if suffix in by_suffix]
    if len(found) != 1:
        raise DataError(
            f"{field} of members.yaml names {item}: one such member is needed among "
            f"{sorted(by_suffix)}"
        )
    return found[0]


def _told(kind: str | None, head: bytes) -> str:
    if kind == "audio":
        return "sound"
    return f"{kind_of_content(head)} data, by its first bytes,"


def _read_text(name: str, data: bytes, rule: MemberRule) -> dict[str, Any]:
    """The fields of a record that a member with a text gives."""
    if not name.lower().endswith(".json"):
        return {"txt": _decoded(data, name)}
    content = _parsed(data, name)
    if isinstance(content, list):
        return {"conversations": content}
    if not isinstance(content, dict):
        return {"caption": content}
    record = {field: value for field, value in content.items() if not rule.ignores(field)}
    if rule.caption in record and rule.caption != MemberRule.caption:
        caption = record.pop(rule.caption)
        record = {field: record[field] for field in record if field not in ("caption", "text")}
        record["caption"] = caption
    return record


def _parsed(data: bytes, name: str) -> Any:
    try:
        return parse_json(data)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8: byte {data[error.start]:#x} at {error.start}"
        ) from error
