"""Conversion of tar members without a record of ours to samples.

In a plain webdataset tar, the files of a sample share a key: `KEY.jpg` with `KEY.txt`, a caption,
or with `KEY.json`, which holds a conversation (a list of turns, alone or as messages, conversations
or conversation; Megatron-Energon's chat samples are such) or an object with a caption. A file
`members.yaml` beside the shards may override this.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron_vita.config.parsing.yaml_file import read_yaml, resolved
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
    """Mapping of tar members to a conversation: the fields of `members.yaml`.

    Attributes:
        text: suffix of the member with the text; empty: `json`, else `txt`.
        caption: field of a JSON object that holds a caption.
        prompt: user's question for samples with only a caption.
        images: suffixes of image members, in order, with alternatives as `jpg;png`; other media are
            then left out.
        videos: suffixes of video members, likewise.
        ignore: patterns of member suffixes and JSON fields to ignore.
    """

    text: str = ""
    caption: str = "caption"
    prompt: str = DEFAULT_PROMPT
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Return true if a suffix or a field is ignored."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)


def read_rule(folder: Path) -> MemberRule:
    """Read the rule for the shards of a folder; the default if it has no `members.yaml`.

    Raises:
        ConfigError: naming the file and the wrong field or key.
    """
    path = folder / RULE_FILE
    if not path.exists():
        return MemberRule()
    values = resolved(read_yaml(path, what="rule")) or {}
    known = [field.name for field in fields(MemberRule)]
    if not isinstance(values, dict) or not set(values) <= set(known):
        raise ConfigError(f"{path}: it has {values!r:.200}; known fields: {', '.join(known)}")
    for name, value in values.items():
        if isinstance(getattr(MemberRule, name), tuple):
            values[name] = _suffixes(value, f"{path}: {name}")
        elif not isinstance(value, str):
            raise ConfigError(f"{path}: {name} is {value!r:.80}: text is needed")
    return MemberRule(**values)


def _suffixes(value: Any, name: str) -> tuple[str, ...]:
    """Parse a list of suffixes, or one suffix; raises ConfigError by `name`."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{name} is {value!r:.80}: a list of suffixes is needed")
    return tuple(value)


def rule_stamp(rule: MemberRule) -> str:
    """Serialize a rule, to compare it with the rule of an index."""
    return json.dumps(asdict(rule), sort_keys=True)


def record_of_members(
    names: Sequence[str],
    read: ReadMember,
    *,
    rule: MemberRule,
    read_head: ReadMember | None = None,
) -> dict[str, Any]:
    """Build the record of a sample from its tar members.

    Args:
        names: names of the members (`KEY.suffix`).
        read: returns the bytes of a member.
        rule: the mapping of members.
        read_head: returns the first `HEAD` bytes of a member; None: use `read`.

    Raises:
        DataError: naming the member: there is no text, it is neither a conversation nor a caption,
            or it is a medium of unclear use.
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
    # The sample is named by its key in the shard.
    sample.pop("id", None)
    if "text" in sample:
        return sample
    return {field: [] for field in FIELDS} | sample


def suffix_of(name: str) -> str:
    """Suffix of a member by webdataset's rule: after the first dot of its name, in lower case."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def text_suffixes(rule: MemberRule) -> Sequence[str]:
    """Suffixes of the members that hold the text."""
    if rule.text:
        return [rule.text.lower()]
    return TEXT_SUFFIXES


def _by_suffix(names: Sequence[str]) -> dict[str, str]:
    by_suffix: dict[str, str] = {}
    for name in names:
        if (first := by_suffix.setdefault(suffix_of(name), name)) != name:
            raise DataError(f"the members {first} and {name} differ in the case of letters alone")
    return by_suffix


def _text_members(by_suffix: Mapping[str, str], rule: MemberRule) -> list[str]:
    suffixes = text_suffixes(rule)
    texts = [by_suffix[suffix] for suffix in suffixes if suffix in by_suffix]
    if not texts:
        raise DataError(
            f"no text among {sorted(by_suffix)}: a member with the suffix {' or '.join(suffixes)} "
            "is needed"
        )
    return texts


def _media_members(by_suffix: Mapping[str, str], rule: MemberRule, read_head: ReadMember) -> Media:
    """Members that are media of the sample; raises DataError naming one of unclear use."""
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
        # A member without a known suffix may be a medium, which must not be lost silently.
        elif kind or kind_of_content(read_head(name)):
            raise DataError(
                f"{name} holds {_told(kind, read_head(name))}: name it in images, videos or ignore "
                "of members.yaml"
            )
    return {field: media[KINDS[field]] for field in FIELDS}


def _listed(by_suffix: Mapping[str, str], item: str, field: str) -> str:
    """Member that an entry of the rule names."""
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
    """Fields of a record in a text member."""
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
