"""Load recipes from YAML files with dotted overrides (`optimizer.lr=3e-4`)."""

import contextlib
import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vita.config.named_layouts import layout_tree, remove_layout, sets_whole_layout
from megatron_vita.config.parsing.build import build
from megatron_vita.config.parsing.yaml_file import parse_override, read_yaml, resolved
from megatron_vita.config.recipe import Recipe
from megatron_vita.errors import ConfigError

LAYOUT = "parallel.layout"
"""Field that stands for many others."""
GROUP = "parallel="
"""Beginning of an override of the whole group with that field."""


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `group.field=value` overrides.

    A file may name base recipes, relative to itself: `base: [stage.yaml, model.yaml]`. Fields of
    later bases replace those of earlier ones, and its own fields replace all of theirs. The fields
    of a layout (`parallel.layout`) replace those of bases; given as an override, those of the file
    too. The value of an override is parsed as YAML if it is a list, a mapping or quoted, else taken
    literally.

    Raises:
        ConfigError: missing file, invalid YAML, duplicate key, unknown field (the message names the
            nearest known one) or invalid value.
    """
    tree = _read_tree(Path(path))
    _apply_overrides(tree, overrides)
    try:
        return build(Recipe, tree)
    except ConfigError as error:
        raise ConfigError(f"{_origin(str(error), overrides) or path}: {error}") from error


def _origin(message: str, overrides: Sequence[str]) -> str:
    """Name the override that a message is about; "" if it is about none."""
    # After it come suggestions, which name other fields.
    message, _, _ = message.partition("; did you mean")
    for override in reversed(overrides):  # the last one of a field is the one that counts
        name = override.partition("=")[0]
        group = name.partition(".")[0]
        is_named = re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message)
        if is_named or message == f"unknown field {group}":
            return f"override {override!r}"
    return ""


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
    # A run's own recipe has all fields: the name says where they are from, and may be gone since.
    if not sets_whole_layout(tree):
        _merge_layout(merged, _layout_of(tree), where=str(path))
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
    _apply_overrides(tree, overrides)
    return build(Recipe, tree)


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    _check_layouts(overrides)
    for override in overrides:
        if override.startswith(GROUP) and not _layout_in(override):
            # The group is replaced, and what its layout has set elsewhere goes with it.
            remove_layout(tree, _layout_of(tree))
        _merge_layout(tree, _layout_in(override), where=f"override {override!r}")
    # After all of a layout's fields, wherever its name stands among the overrides.
    for override in overrides:
        _apply_override(tree, override)
        if override.startswith(GROUP):
            # The group was replaced, and the fields of its layout with it.
            given = tree["parallel"]
            tree["parallel"] = layout_tree(_layout_in(override)).get("parallel", {})
            _merge(tree, {"parallel": given})


def _check_layouts(overrides: Sequence[str]) -> None:
    """Check that no override names a layout whose group another one replaces.

    Raises:
        ConfigError: one does; fields of the layout in other groups would stay, or its sizes go.
    """
    named = [override for override in overrides if _layout_in(override)]
    replacing = [override for override in overrides if override.startswith(GROUP)]
    for group in replacing:
        for other in named:
            if group != other:
                raise ConfigError(
                    f"override {group!r} replaces all of parallel, for which override {other!r} names a layout: "
                    "write one of them, such as 'parallel={layout: NAME, context_parallel_size: 2}'"
                )


def _layout_in(override: str) -> Any:
    """Name of the layout that an override gives, by itself or in its group; None if it gives none."""
    name, _, text = override.partition("=")
    if name == LAYOUT:
        return parse_override(text)
    if name == "parallel":
        # What is wrong with the text is said where it is applied.
        with contextlib.suppress(ConfigError):
            return _layout_of({"parallel": parse_override(text)})
    return None


def _layout_of(tree: dict[str, Any]) -> Any:
    """Name of the layout that a recipe's tree gives; None if it gives none."""
    parallel = tree.get("parallel")
    return parallel.get("layout") if isinstance(parallel, dict) else None


def _merge_layout(tree: dict[str, Any], name: Any, *, where: str) -> None:
    """Replace fields of a recipe by those of a layout; `where` says who names it."""
    try:
        later = layout_tree(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if later:
        # Not all layouts set fields of the optimizer.
        remove_layout(tree, _layout_of(tree))
    _merge(tree, later)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {override!r} is not of the form group.field=value")
    *groups, field = name.split(".")
    for group in groups:
        # A group that does not exist is created, so that `build` reports its name as unknown.
        tree = tree.setdefault(group, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {group} is not a group of fields")
    try:
        tree[field] = parse_override(text)
    except ConfigError as error:
        raise ConfigError(f"override {override!r}: {error}") from error
