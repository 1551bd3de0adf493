"""The one reader of YAML: keys stand once, and plain scalars keep their text until a field says
what they are.

YAML 1.1 reads `no` as a boolean, `1:30` as 90, `010` as 8, `1e-4` as text and `2026-11-28` as a
date. Here the type of the field that a value is for decides: all of these are names where text is
needed.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_vita.errors import ConfigError

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)")
_FLOAT = re.compile(
    r"[-+]?(\.inf|((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)(e[-+]?[0-9]+)?)", re.IGNORECASE
)
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULL = re.compile("null|Null|NULL|~")
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
_PARSED = re.compile(r"""\s*["'\[{]""")  # what a text begins with that is more than a plain scalar


class PlainScalar(str):
    """The text of a scalar that was not quoted."""


def read_yaml(path: Path, *, what: str) -> Any:
    """The content of a YAML file, in which unquoted scalars other than null are `PlainScalar`s.

    Raises:
        ConfigError: naming the file, and `what` it is, if it cannot be read; or the line if it is
            no YAML, or has a key that stands twice in a mapping.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the {what}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    try:
        return _load(text)
    except _DuplicateKeyError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from error
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: not YAML: {_in_one_line(error)}") from error


def parse_override(text: str) -> Any:
    """The value of an override: YAML where it is quoted, a list or a mapping; else its own text, as
    a `PlainScalar`. So is what only begins like YAML.

    Raises:
        ConfigError: a key stands twice.
    """
    if _PARSED.match(text):
        try:
            return _load(text)
        except _DuplicateKeyError as error:
            raise ConfigError(str(error)) from error
        except _YAML_ERRORS:
            pass
    return PlainScalar(text.strip())


def scalar_as(kind: type, text: PlainScalar) -> Any:
    """An unquoted scalar as a `kind` (str, int, float or bool), or None if it is none.

    Numbers are YAML 1.2's; leading zeros, which are octal in YAML 1.1, make no number.
    """
    if kind is str:
        if _NULL.fullmatch(text):
            return None
        return str(text)
    if kind is bool:
        return _BOOLS.get(text.lower())
    if kind is int and _INT.fullmatch(text):
        return int(text, 0)
    if kind is float and _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf"))
    return None


def is_null(value: Any) -> bool:
    """Whether a value is null, as YAML writes it or as an empty override."""
    return value is None or (
        isinstance(value, PlainScalar) and (not value or bool(_NULL.fullmatch(value)))
    )


def resolved(value: Any) -> Any:
    """A value, or all values in it, as YAML 1.2 takes them where no field says what they are."""
    if isinstance(value, dict):
        return {str(key): resolved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if not isinstance(value, PlainScalar):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        if (number := scalar_as(kind, value)) is not None:
            return number
    if _NULL.fullmatch(value):
        return None
    return str(value)


class _DuplicateKeyError(Exception):
    """A key stands twice, the second time in `line`."""

    def __init__(self, name: str, line: int, first: int) -> None:
        super().__init__(f"the key {name} stands twice, first in line {first}")
        self.line = line


class _Loader(yaml.SafeLoader):
    """Safe; resolves nothing but null, and refuses keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            name = str(key.value)
            if name in lines:
                raise _DuplicateKeyError(name, line, lines[name])
            lines[name] = line
        return super().construct_mapping(node, deep=deep)

    def construct_plain(self, node: yaml.ScalarNode) -> str:
        """A scalar of no known type: its text."""
        text = self.construct_scalar(node)
        if node.style:
            return text
        return PlainScalar(text)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_plain)


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
