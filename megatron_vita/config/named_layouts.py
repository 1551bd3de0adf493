"""Layouts by name (`parallel.layout: 7b-stage3-8x80`): parallel sizes and memory levers together.

The names and their fields are in layouts.json, which benchmarks/layouts.py writes.
"""

import difflib
import functools
import json
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_vita.config.parsing.yaml_file import is_null
from megatron_vita.errors import ConfigError

FILE = Path(__file__).with_name("layouts.json")
Fields = dict[str, Any]


@functools.cache
def known_layouts() -> dict[str, Fields]:
    """Read all layouts: by name, the values of fields by their dotted names.

    Every layout sets all parallel sizes and levers of `training`, so that nothing of the recipe's own
    is left; fields of the optimizer only where nothing fits otherwise.
    """
    content = _content()
    return {name: content["usual"] | changes for name, changes in content["layouts"].items()}


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def sets_whole_layout(tree: Fields) -> bool:
    """Return true if a recipe's tree sets every field that all layouts set."""
    return all(_value_at(tree, field) is not _ABSENT for field in _content()["usual"])


def remove_layout(tree: Fields, name: Any) -> None:
    """Remove from a recipe's tree the values that a layout has set; unknown names have set none."""
    for field, value in known_layouts().get(str(name), {}).items():
        if _value_at(tree, field) == value:
            group, _, field = field.partition(".")
            del tree[group][field]


_ABSENT = object()


def _value_at(tree: Fields, field: str) -> Any:
    group, _, field = field.partition(".")
    values = tree.get(group)
    return values.get(field, _ABSENT) if isinstance(values, dict) else _ABSENT


def layout_fields(name: str) -> Fields:
    """Look up a layout.

    Raises:
        ConfigError: there is none of this name; the message names the nearest ones.
    """
    known = known_layouts()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(
            f"parallel.layout is {name!r}, which is no layout of docs/layouts.md{hint}"
        )
    return known[name]


def layout_changes(recipe: Any, changes: Mapping[str, Any]) -> Fields:
    """Fields that change with the layout that changes of a recipe ask for; none if they ask for none.

    What an earlier layout has set, and this one does not, gets its default again.

    Raises:
        ConfigError: as `layout_fields`.
    """
    name = changes.get("parallel.layout")
    if not name:
        return {}
    later = layout_fields(name)
    defaults = type(recipe)()
    reset: Fields = {}
    for field, value in known_layouts().get(recipe.parallel.layout, {}).items():
        value_of = attrgetter(field)
        if field not in later and value_of(recipe) == value:
            reset[field] = value_of(defaults)
    return reset | later


def layout_tree(name: Any) -> dict[str, Fields]:
    """Fields of a layout by group, as in a recipe file; none for an empty name.

    Raises:
        ConfigError: as `layout_fields`.
    """
    tree: dict[str, Fields] = {}
    if is_null(name) or name == "":
        return tree
    for field, value in layout_fields(str(name)).items():
        group, _, field = field.partition(".")
        tree.setdefault(group, {})[field] = value
    return tree
