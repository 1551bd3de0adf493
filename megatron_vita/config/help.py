"""Text of `--help` for recipes: every field with its type, default and documentation."""

import dataclasses
import re
import typing
from collections.abc import Iterator

from megatron_vita.config.recipe import Recipe


def describe_fields(cls: type = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield an entry for each field of a recipe: `group.field: type = default`, then its line."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield f"\n{prefix}{field.name}: {field.metadata['doc']}"
            yield from describe_fields(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        if typing.get_origin(hint) is typing.Literal:
            type_name = " | ".join(typing.get_args(hint))
        elif isinstance(hint, type) and not typing.get_args(hint):
            type_name = hint.__name__
        else:
            type_name = str(hint)
        head = f"{prefix}{field.name}: {_short(type_name)} = {_default(field)}"
        yield f"  {head}\n      {field.metadata['doc']}"
        for item in typing.get_args(hint):
            if dataclasses.is_dataclass(item):
                yield from describe_fields(typing.cast(type, item), f"{prefix}{field.name}[].")


def _short(type_name: str) -> str:
    return (
        re.sub(r"megatron_vita\.config\.\w+\.", "", type_name)
        .replace("typing.", "")
        .replace("<class '", "")
        .replace("'>", "")
    )


def _default(field: dataclasses.Field[typing.Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(required)"
