"""Typed groups of fields from plain values: unknown names and wrong types are refused by name.

`path` is the dotted name of a group with a dot at its end; empty at the root.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, cast

from megatron_vita.config.parsing.fields import type_hints
from megatron_vita.config.parsing.yaml_file import PlainScalar, is_null, resolved, scalar_as
from megatron_vita.errors import ConfigError


def build[T](root: type[T], tree: Any) -> T:
    """Build a dataclass of nested groups from nested plain values.

    Raises:
        ConfigError: unknown field (the message names the nearest known one), wrong type or value.
    """
    return cast(T, _build(root, tree, path=""))


def replaced[T](group: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of a dataclass of nested groups with fields replaced; all are checked together.

    Args:
        group: the instance, which keeps its fields.
        changes: values by dotted names, as {"training.bf16": True}; a value may be a group.

    Raises:
        ConfigError: as `build`.
    """
    return cast(T, _replace(group, changes, path=""))


def _build(cls: type, tree: Any, *, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path.removesuffix('.') or 'the recipe'} is {resolved(tree)!r}: a group of fields is needed"
        )
    values = _values(cls, tree, path)
    for field in dataclasses.fields(cls):
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        if field.name not in values and not has_default:
            raise ConfigError(f"{path}{field.name} is missing")
    return cls(**values)


def _replace(group: Any, changes: Mapping[str, Any], *, path: str) -> Any:
    own = {name: value for name, value in changes.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
    values = _values(type(group), own, path)
    _check_names(type(group), nested, path)
    for name, changed in nested.items():
        # A group that is replaced as a whole may have some of its fields replaced as well.
        inner = values.get(name, getattr(group, name))
        if not dataclasses.is_dataclass(inner):
            raise ConfigError(f"{path}{name} is not a group of fields")
        values[name] = _replace(inner, changed, path=f"{path}{name}.")
    return dataclasses.replace(group, **values)


def _values(cls: type, tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    _check_names(cls, tree, path)
    hints = type_hints(cls)
    return {name: _convert(hints[name], value, f"{path}{name}") for name, value in tree.items()}


def _check_names(cls: type, names: Mapping[str, Any], path: str) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown field {path}{name}; {_hint(cls, name, known, path)}")


def _hint(cls: type, name: str, known: list[str], path: str) -> str:
    # A field at the top level is mostly one whose group was forgotten: `lr=1e-4`.
    named = [] if path else [leaf for leaf in leaves(cls) if leaf.endswith(f".{name}")]
    if named:
        return f"did you mean {' or '.join(named)}?"
    if nearest := difflib.get_close_matches(str(name), known, n=1, cutoff=0.5):
        return f"did you mean {path}{nearest[0]}?"
    return f"known: {', '.join(known)}"


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if isinstance(value, cast(type, hint)):
            return value
        short = getattr(hint, "SHORT", None)
        if short and isinstance(value, str):
            value = {short: value}
        return _build(cast(type, hint), value, path=f"{path}.")
    origin = typing.get_origin(hint)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} is {resolved(value)!r}: a mapping is needed")
        return resolved(value)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{path} is {resolved(value)!r}: a list is needed")
        (item,) = typing.get_args(hint)
        return [_convert(item, entry, f"{path}[{i}]") for i, entry in enumerate(value)]
    if origin in (typing.Union, types.UnionType):
        # The only unions are of a type and None, or of a scalar and a list.
        if is_null(value):
            return None
        return _convert(_member_for(value, hint), value, path)
    return _convert_scalar(hint, value, path)


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields of a dataclass and of the groups in it."""
    for name, hint in type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name


def _member_for(value: Any, union: Any) -> Any:
    """Select the member of a union to convert a value to: the list type for a list, else the
    first."""
    members = typing.get_args(union)
    lists = [member for member in members if typing.get_origin(member) is list]
    if lists and isinstance(value, list):
        return lists[0]
    return members[0]


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        hint = str  # check_fields compares it with the choices
    if isinstance(value, PlainScalar):
        if (typed := scalar_as(hint, value)) is not None:
            return typed
    # bool is a subclass of int, but `true` is no number.
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path} is {resolved(value)!r}: {hint.__name__} is needed")
