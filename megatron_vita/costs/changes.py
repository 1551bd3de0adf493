"""Differences between recipes, as changed fields and as overrides."""

from operator import attrgetter
from typing import Any

from megatron_vita.config import Recipe

Changes = dict[str, Any]
"""Values by dotted names of fields, such as training.recompute_vision."""


def differences(before: Recipe, after: Recipe, names: tuple[str, ...]) -> dict[str, Any]:
    """Return those of the named fields that differ, with their values in `after`."""
    found = {}
    for name in names:
        value_of = attrgetter(name)
        value = value_of(after)
        if value != value_of(before):
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
