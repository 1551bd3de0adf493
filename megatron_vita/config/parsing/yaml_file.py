"""YAML reader that refuses duplicate keys and leaves the types of plain scalars to recipe fields.

YAML 1.1 reads `no` as a boolean, `1:30` as 90, `010` as 8, `1e-4` as text and `2026-11-28` as a
date. Here the type of the recipe field decides: all of these are valid strings for a text field.
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
_PARSED = re.compile(r"""\s*["'\[{]""")  # beginning of a value that is not a plain scalar


class PlainScalar(str):
    """Text of an unquoted scalar."""


def read_yaml(path: Path, *, what: str) -> Any:
    """Read a YAML file; unquoted scalars other than null become `PlainScalar`s.

    Args:
        path: the file.
        what: kind of file, for error messages: "recipe".

    Raises:
        ConfigError: the file cannot be read, is not YAML, or repeats a key in a mapping.
    """
    try:
        # Editors on Windows begin files with a byte order mark, which would be part of a key.
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
    """Parse the value of an override: YAML if it is quoted, a list or a mapping, else plain text.

    Text that begins like YAML but is not valid is plain text too.

    Raises:
        ConfigError: a mapping repeats a key.
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
    """Convert an unquoted scalar to `kind` (str, int, float or bool); None if it is not one.

    Numbers follow YAML 1.2; text with leading zeros, octal in YAML 1.1, is not a number.
    """
    if kind is str:
        if _NULL.fullmatch(text):
            return None
        return str(text)
    if kind is bool:
        return _BOOLS.get(text.lower())
    # Base 0 reads the prefixes of hexadecimal and octal numbers.
    if kind is int and _INT.fullmatch(text):
        return int(text, 0)
    # YAML writes infinity with a dot, Python without.
    if kind is float and _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf"))
    return None


def is_null(value: Any) -> bool:
    """Return true for null, as YAML writes it or as an empty override."""
    return value is None or (
        isinstance(value, PlainScalar) and (not value or bool(_NULL.fullmatch(value)))
    )


def resolved(value: Any) -> Any:
    """Convert a value and all values in it by YAML 1.2, for values without a typed field."""
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
    """A mapping repeats a key, in `line`."""

    def __init__(self, name: str, line: int, first: int) -> None:
        super().__init__(f"the key {name} occurs twice, first in line {first}")
        self.line = line


class _Loader(yaml.SafeLoader):
    """Safe loader that resolves only null and refuses duplicate keys."""

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
        """Construct a scalar as text: `PlainScalar` unless it is quoted."""
        text = self.construct_scalar(node)
        if node.style:
            return text
        return PlainScalar(text)


# PyYAML turns scalars into numbers and booleans by these tables: without them `no` and `1:30` stay
# text. Those for null and for merge keys (`<<`) remain.
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
