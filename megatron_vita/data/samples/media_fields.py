"""Media in the fields of third-party records.

A field is read as media if its name says so (`image`, `videos`, `img_path`, `image_1`, `jpg`, ...).
Any other field whose value looks like a medium is refused by name, so that no sample is trained
without its media.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from megatron_vita.errors import DataError
from megatron_vita.media.data_urls import is_inline
from megatron_vita.media.kinds import HEAD, IMAGE_SUFFIXES, kind_of_content, kind_of_name

Field = Literal["images", "videos"]
Value = str | bytes
"""A medium in a record: a path, a data URL, or the content of a file."""
Media = dict[str, list[Value]]
"""Media by field: `images` and `videos`."""

FIELDS: tuple[Field, ...] = ("images", "videos")
KINDS: dict[Field, str] = {"images": "image", "videos": "video"}

_ENDING = "s?(_?(path|file|filepath|filename|file_name|name|list|bytes|base64|b64)s?)?(_str)?"
_NAMES: dict[Field, re.Pattern[str]] = {
    "images": re.compile(f"(image|img|picture|pic|photo){_ENDING}"),
    "videos": re.compile(f"video{_ENDING}"),
}
_NUMBERED: dict[Field, re.Pattern[str]] = {
    "images": re.compile(r"(?:image|img)_?(\d+)"),
    "videos": re.compile(r"video_?(\d+)"),
}
_SUFFIX_NAMES: dict[Field, frozenset[str]] = {
    "images": frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES),
    "videos": frozenset({"mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg"}),
}
_FILE_NAMES = ("file_name", "filename", "filepath", "file_path", "file", "path")
"""Fields that hold a medium's path if no other does, as in the metadata of image folders."""
_ORIGINS = re.compile(
    r"_*(orig(inal)?_.*|source_.*|.*url|.*uri|.*link|.*source|src|(.*_)?id"
    r"|key|name|title|alt|text|txt|caption|prompt)_*"
    rf"|{'|'.join(_FILE_NAMES)}"
)
"""Fields that may repeat the name of a medium that the record has, or state its origin."""
_CODE = (".ts",)  # suffixes of TypeScript as well as of videos
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAX_PATH = 1024


def is_filled(value: Any) -> bool:
    """Return false for null, empty values, and lists and objects of nulls."""
    if isinstance(value, Mapping):
        return any(map(is_filled, value.values()))
    if isinstance(value, list | tuple):
        return any(item == "" or is_filled(item) for item in value)
    return value is not None and value not in ("", b"")


def has_media_fields(names: Iterable[str]) -> bool:
    """Return true if one of the names of fields is that of a field for media."""
    fields = dict.fromkeys(names)
    return any(_groups(fields, field) for field in FIELDS)


def take_media(fields: dict[str, Any]) -> Media:
    """Remove the media from a record's fields and return them.

    Raises:
        DataError: naming the field that holds no media, or fields that hold different ones.
    """
    if name := next((name for name in ("audio", "audios") if is_filled(fields.get(name))), None):
        raise DataError(f"{name} is {_short(fields[name])}: sound is not read")
    media: Media = {}
    for field in FIELDS:
        found = {
            name: _values_of_group(group, fields, field)
            for name, group in _groups(fields, field).items()
        }
        media[field] = _agreed({name: values for name, values in found.items() if values}, field)
    if not any(media.values()):
        _take_file_name(fields, media)
    for field in FIELDS:
        for name in [name for group in _groups(fields, field).values() for name in group]:
            del fields[name]
    return media


def refuse_unread(fields: Mapping[str, Any], media: Media) -> None:
    """Raise DataError, naming the field, if unread fields hold media other than `media`."""
    stems = {_stem(value) for values in media.values() for value in values if _is_path(value)}
    for path, value in _media_in(fields, ""):
        field = re.sub(r"\[\d+\]", "", path).rpartition(".")[2].lower()
        # A URL or a title beside a medium is its origin or name, not a second medium.
        is_origin = any(media.values()) and bool(_ORIGINS.fullmatch(field))
        if not _is_path(value) or not (is_origin or _stem(value) in stems):
            raise DataError(
                f"{path} is {_short(value)}, which looks like a medium, in a field that is not "
                "read: name it images or videos, or leave it out (import has --ignore)"
            )


def agreed_media(first: Media, second: Media, *, names: tuple[str, str]) -> Media:
    """Merge the media of two places of a record: one has none, or both have the same."""
    return {
        field: _agreed(
            {
                name: values
                for name, media in zip(names, (first, second), strict=True)
                if (values := media.get(field, []))
            },
            field,
        )
        for field in FIELDS
    }


def values_of(value: Any, name: str) -> list[Value]:
    """Media of a field: a path, bytes, {bytes, path}, or a list; raises DataError naming `name`."""
    if not is_filled(value):
        return []
    if isinstance(value, list | tuple):
        return [_value_of(item, f"{name}[{i}]") for i, item in enumerate(value)]
    return [_value_of(value, name)]


def _value_of(value: Any, name: str) -> Value:
    if isinstance(value, Mapping) and set(value) & {"bytes", "path", "url"}:
        value = value.get("bytes") or value.get("path") or value.get("url")
    if isinstance(value, str | bytes) and value:
        return value
    raise DataError(
        f"{name} is {_short(value)}: a path under the media folder is needed, or a file's content"
    )


def _groups(fields: Mapping[str, Any], field: Field) -> dict[str, list[str]]:
    """Media fields by name, with numbered fields grouped together."""
    numbered: dict[int, str] = {}
    groups = {}
    for name in fields:
        if match := _NUMBERED[field].fullmatch(name.lower()):
            numbered[int(match[1])] = name
        elif _NAMES[field].fullmatch(name.lower()) or name.lower() in _SUFFIX_NAMES[field]:
            groups[name] = [name]
    if numbered:
        names = [numbered[number] for number in sorted(numbered)]
        groups[", ".join(names)] = names
    return groups


def _values_of_group(group: Sequence[str], fields: Mapping[str, Any], field: Field) -> list[Value]:
    values = [value for name in group for value in values_of(fields[name], name)]
    for value in values:
        kind = None
        if _is_path(value):
            kind = kind_of_name(str(value))
        # A GIF may be given as an image or as a video.
        if kind not in (None, KINDS[field]) and not str(value).lower().endswith(".gif"):
            raise DataError(
                f"{', '.join(group)} is {_short(value)}, by its suffix {kind}: "
                f"{KINDS[field]}s are needed"
            )
    return values


def _agreed(found: dict[str, list[Value]], field: Field) -> list[Value]:
    """Media that several fields name: all equal, or paths beside the contents of the files."""
    lists = list(found.values())
    if not lists:
        return []
    # Datasets with embedded images often keep their paths in another field: contents win then.
    contents = [values for values in lists if any(isinstance(value, bytes) for value in values)]
    same = all(values == lists[0] for values in lists)
    if not same and (len(contents) != 1 or {len(values) for values in lists} != {len(contents[0])}):
        names = " and ".join(found)
        raise DataError(f"{names} hold different {field}: which are meant? (import has --ignore)")
    if contents:
        return contents[0]
    return lists[0]


def _take_file_name(fields: dict[str, Any], media: Media) -> None:
    for name in _FILE_NAMES:
        value = fields.get(name)
        if isinstance(value, str) and is_medium(value) and not _URL.match(value):
            field: Field = "images"
            if kind_of_name(value) == "video":
                field = "videos"
            if kind_of_name(value) != "audio":
                media[field] = [value]
                del fields[name]
                return


def is_medium(value: Any) -> bool:
    """Return true for a value that looks like a medium: content, data URL, or path by suffix."""
    if isinstance(value, bytes):
        return kind_of_content(value[:HEAD]) is not None
    if not isinstance(value, str):
        return False
    if is_inline(value):
        return True
    name = _without_query(value)
    if len(name) > _MAX_PATH or "\n" in name or not PurePosixPath(name).suffix:
        return False
    return kind_of_name(name) is not None and not name.lower().endswith(_CODE)


def _media_in(value: Any, path: str) -> Iterator[tuple[str, Value]]:
    """Yield values inside a value that look like media, each with its dotted path."""
    if isinstance(value, Mapping) and {"bytes", "path"} <= value.keys():
        value = value["bytes"] or value["path"]  # as `datasets` keeps an image
    if isinstance(value, Mapping):
        for name, item in value.items():
            inner = str(name)
            if path:
                inner = f"{path}.{name}"
            yield from _media_in(item, inner)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _media_in(item, f"{path}[{i}]")
    elif is_medium(value):
        yield path, value


def _is_path(value: Value) -> bool:
    return isinstance(value, str) and not is_inline(value)


def _stem(value: Value) -> str:
    return PurePosixPath(_without_query(str(value))).stem


def _without_query(text: str) -> str:
    if _URL.match(text):
        return re.split("[?#]", text, maxsplit=1)[0]
    return text


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes that begin with {value[:8]!r}"
    return f"{value!r:.80}"
