"""Load recipes from YAML files with dotted overrides (`optimizer.lr=3e-4`)."""

import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vita.config.recipe import Recipe
from megatron_vita.config.yaml_file import (
    PlainScalar,
    is_null,
    parse_override,
    read_yaml,
    resolved,
    scalar_as,
)
from megatron_vita.errors import ConfigError


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `group.field=value` overrides.

    A file may name base recipes, relative to itself: `base: [stage.yaml, model.yaml]`. Fields of
    later bases replace those of earlier ones, and its own fields replace all of theirs. The value
    of an override is parsed as YAML if it is a list, a mapping or quoted, else taken literally.

    Raises:
        ConfigError: missing file, invalid YAML, duplicate key, unknown field (the message names the
            nearest known one) or invalid value.
    """
    tree = _read_tree(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    try:
        return _build(Recipe, tree, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_tree(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file, merged over its bases; `readers` are the files that include it."""
    tree = read_yaml(path, what="recipe")
    if not isinstance(tree, dict):
        found = type(resolved(tree)).__name__
        raise ConfigError(f"{path}: a recipe is a mapping of groups, this is {found}")
    bases = tree.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base is {resolved(bases)!r}: a list of recipe files is needed")
    readers = (*readers, path.resolve())
    # Bases before the file itself: what is merged later replaces what was there.
    merged: dict[str, Any] = {}
    for base in bases:
        if (file := path.parent / base).resolve() in readers:
            raise ConfigError(f"{path}: base {base} includes this file again: a cycle")
        _merge(merged, _read_tree(file, readers))
    _merge(merged, tree)
    return merged


def _merge(tree: dict[str, Any], later: dict[str, Any]) -> None:
    for name, value in later.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def recipe_from_dict(tree: dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Build a Recipe from nested plain values, as of `dataclasses.asdict`, and overrides.

    Raises:
        ConfigError: as `load_recipe`.
    """
    # Overrides are written into the tree, which is the caller's.
    tree = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    return _build(Recipe, tree, "")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {override!r} is not of the form group.field=value")
    *groups, field = name.split(".")
    for group in groups:
        # A group that does not exist is created, so that `_build` reports its name as unknown.
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {group} is not a group of fields")
    try:
        tree[field] = parse_override(text)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from error


def _build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path or 'the recipe'} is {resolved(tree)!r}: a group of fields is needed"
        )
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in tree:
        if name not in known:
            raise ConfigError(_unknown(f"{path}{name}", name, known))
    values = {name: _convert(hints[name], value, f"{path}{name}") for name, value in tree.items()}
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path}{missing[0]} is missing")
    return cls(**values)


def _unknown(full_name: str, name: str, known: dict[str, Any]) -> str:
    group = full_name[: -len(str(name))]
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    # A field at the top level is mostly one whose group was forgotten: `lr=1e-4`.
    named = [] if group else [path for path in _leaves(Recipe) if path.endswith(f".{name}")]
    if named:
        hint = f"did you mean {' or '.join(named)}?"
    elif nearest:
        hint = f"did you mean {group}{nearest[0]}?"
    else:
        hint = f"known: {', '.join(known)}"
    return f"unknown field {full_name}; {hint}"


def _leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a recipe's fields."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        short = getattr(hint, "SHORT", None)
        if short and isinstance(value, str):
            value = {short: value}
        return _build(typing.cast(type, hint), value, f"{path}.")
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
