"""Text of `--help` for recipes: every field with its type or choices, default, documentation and bounds."""

import dataclasses
import types
import typing
from collections.abc import Iterator

from megatron_vita.config.parsing.fields import type_hints
from megatron_vita.config.recipe import Recipe


def describe_fields(cls: type = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield an entry for each field of a recipe: `group.field: type = default`, then its line."""
    hints = type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield f"\n{prefix}{field.name}: {field.metadata['doc']}"
            yield from describe_fields(typing.cast(type, hint), f"{prefix}{field.name}.")
            continue
        # Names of a registry are no part of the type.
        choices = " | ".join(field.metadata["choices"] or ())
        head = f"{prefix}{field.name}: {choices or _type_name(hint)} = {_default(field)}"
        yield f"  {head}\n      {field.metadata['doc']}"
        for item in typing.get_args(hint):
            if dataclasses.is_dataclass(item):
                yield from describe_fields(typing.cast(type, item), f"{prefix}{field.name}[].")


def _type_name(hint: typing.Any) -> str:
    """Name a type as a recipe's reader would: choices and unions are separated by bars."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " | ".join(typing.get_args(hint))
    if hint is types.NoneType:
        return "null"
    items = [_type_name(item) for item in typing.get_args(hint)]
    if origin in (typing.Union, types.UnionType):
        return " | ".join(items)
    if items:
        return f"{hint.__name__}[{', '.join(items)}]"
    return str(hint.__name__)


def _default(field: dataclasses.Field[typing.Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "(required)"
