"""Layouts by name (`parallel.layout: 7b-stage3-8x80`): parallel sizes and memory levers together.

The names and their fields are in layouts.json, which benchmarks/layouts.py writes.
"""

import difflib
import functools
import json
from pathlib import Path
from typing import Any

from megatron_vita.config.yaml_file import is_null
from megatron_vita.errors import ConfigError

FILE = Path(__file__).with_name("layouts.json")
Fields = dict[str, Any]


@functools.cache
def known_layouts() -> dict[str, Fields]:
    """Read all layouts: by name, the value of each governed field by its dotted name."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    # Every layout sets all governed fields, so that nothing of the recipe's own layout is left.
    return {name: content["usual"] | changes for name, changes in content["layouts"].items()}


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
