"""Copies of recipes with changed fields."""

import dataclasses
from typing import Any

from megatron_vita.config import Recipe

Changes = dict[str, Any]
"""Values by dotted names of fields, such as training.recompute_vision."""


def change(recipe: Recipe, changes: Changes) -> Recipe:
    """Return a copy of the recipe with changed fields, validated like any recipe.

    Raises:
        ConfigError: the values are invalid together.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        group, _, field = name.partition(".")
        groups.setdefault(group, {})[field] = value
    parts = {
        group: dataclasses.replace(getattr(recipe, group), **values)
        for group, values in groups.items()
    }
    return dataclasses.replace(recipe, **parts)


def differences(before: Recipe, after: Recipe, names: tuple[str, ...]) -> dict[str, Any]:
    """Return those of the named fields that differ, with their values in `after`."""
    found = {}
    for name in names:
        group, _, field = name.partition(".")
        value = getattr(getattr(after, group), field)
        if value != getattr(getattr(before, group), field):
            found[name] = value
    return found


def as_overrides(changes: Changes) -> str:
    """Format changes as command line overrides."""
    return " ".join(f"{name}={_plain(value)}" for name, value in changes.items())


def _plain(value: Any) -> str:
    # As YAML, which overrides are read as, spells booleans and lists.
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value)
